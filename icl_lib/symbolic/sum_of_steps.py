r"""The steps of all tokens add up to the weight update, however many tokens there are."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp
from sympy.matrices.expressions.matexpr import MatrixElement

from icl_lib.symbolic.any_size import IN, weight_update_any_size
from icl_lib.symbolic.attention import DIM, TOKENS
from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import SHAPES
from icl_lib.symbolic.notation import A_WITHOUT, SQUARED_NORM, stacked
from icl_lib.symbolic.token_step import NEXT, NOW, SOURCE, STEP_FORMULA

LAST = r"\boldsymbol{a}_n"
FACTOR = rf"\frac{{a_{{0,c}}}}{{{SQUARED_NORM}}}"
ROW, COLUMN, TOKEN = sp.symbols("r c i", integer=True, nonnegative=True)


@cache
def telescoping() -> Derivation:
    r"""Derive that the steps of $n$ tokens add up to the weight update of all of them, for every $n$ and every size.

    $$\sum_{i=0}^{n-1} (W_{i+1} - W_i) = \frac{W (a_n - a_0)\, a_0^\top}{\|a_0\|^2} = \Delta W(c_1 \dots c_n)$$

    The number $n$ of tokens stays a symbol. SymPy does not add up matrices of symbolic size, so it adds up one entry,
    in row $r$ and column $c$, which stay symbols too.

    Source: Dherin et al., Proposition 3.1.

    Shapes: the result, the sum of the steps, is a function of ``W`` ``[out, in]``, ``a_without`` ``[in]`` and
    ``a_with`` ``[in]``, which is $a_n$, of any sizes.

    >>> import numpy as np
    >>> derivation = telescoping()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    array([[1., 1.],
           [0., 0.]])
    """
    least = weight_update_any_size()
    # Here n counts tokens, so d is the size of what is read.
    W, a0, last, formula = (whole.xreplace({IN: DIM}) for whole in (*least.arguments.values(), least.result))
    now, after = (sp.MatrixSymbol(name, DIM, 1) for name in (NOW, NEXT))

    def update(read: sp.MatrixExpr) -> sp.MatrixExpr:
        return formula.xreplace({last: read})

    step = rewritten(update(after) - update(now), W * (after - now) * a0.T / sp.Trace(a0.T * a0))
    reads = {a0: sp.S.Zero, now: TOKEN, after: TOKEN + 1, last: TOKENS}
    of_step, of_update = _entry(step, reads), sp.factor_terms(_entry(formula, reads))
    added = sp.factor_terms(sp.Sum(of_step, (TOKEN, 0, TOKENS - 1)))
    total = added.replace(sp.Sum, _summed)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        after_next, after_now = (candidate.xreplace({last: read}) for read in (after, now))
        return {
            "no token": candidate.xreplace({last: a0}),
            "one token more": after_next - after_now - step,
        }

    return Derivation(
        name="telescoping",
        source=SOURCE,
        assumptions=(
            Step(
                "Step",
                step,
                STEP_FORMULA,
                "Token $i + 1$ makes this step: it is that of `gradient_step`, here with matrices as wholes, of any "
                "size $m \\times d$.",
            ),
            least.step("Something to read"),
        ),
        steps=(
            Step(
                "One entry",
                of_step,
                stacked(
                    r"(W_{i+1} - W_i)_{r,c}",
                    rf"{{}} = {FACTOR} \sum_{{k=1}}^{{d}} W_{{r,k}}\, (a_{{i+1,k}} - a_{{i,k}})",
                ),
                "SymPy multiplies out the product of matrices, for any row $r$ and any column $c$.",
            ),
            Step(
                "The order of the sums",
                added,
                rf"{FACTOR} \sum_{{k=1}}^{{d}} \sum_{{i=0}}^{{n-1}} W_{{r,k}}\, (a_{{i+1,k}} - a_{{i,k}})",
                "We add the steps of $n$ tokens. What does not depend on the token comes out of the sum over the "
                "tokens, and of two finite sums either may be taken first.",
            ),
            Step(
                "The sum over the tokens",
                total,
                rf"{FACTOR} \sum_{{k=1}}^{{d}} W_{{r,k}}\, (a_{{n,k}} - a_{{0,k}})",
                "SymPy sums over $i$, with $n$ a symbol: what is read is added once and subtracted once, except at the "
                "end and at the start.",
            ),
            Step(
                "The weight update",
                rewritten(total, of_update),
                r"\sum_{i=0}^{n-1} (W_{i+1} - W_i) = \Delta W(c_1 \dots c_n)",
                f"This is the same entry of the weight update with ${LAST}$ for $\\boldsymbol{{a}}_C$.",
            ),
            Step(
                "The same by induction",
                tuple(must_vanish(formula).values()),
                stacked(
                    r"\Delta W(\varnothing) = 0",
                    r"\Delta W(c_1 \dots c_{i+1}) = \Delta W(c_1 \dots c_i)",
                    r"{} + (W_{i+1} - W_i)",
                ),
                "Without a token nothing is added, and one token more adds its step; SymPy proves both for matrices as "
                "wholes, and this is how the result is checked.",
            ),
        ),
        result=formula,
        latex=stacked(
            r"\sum_{i=0}^{n-1} (W_{i+1} - W_i)",
            rf"{{}} = \frac{{W ({LAST} - {A_WITHOUT})\, {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}",
        ),
        arguments={"W": W, "a_without": a0, "a_with": last},
        shapes=SHAPES,
        must_vanish=must_vanish,
    )


def _entry(whole: sp.MatrixExpr, reads: Mapping[sp.MatrixSymbol, sp.Expr]) -> sp.Expr:
    """Return one entry of a matrix, with $a_{i,k}$ for entry $k$ of what is read after $i$ tokens."""
    a = sp.IndexedBase("a", real=True)
    element = whole[ROW, COLUMN].rewrite(sp.Sum).replace(sp.Sum, _summed)
    read = {entry: a[reads[entry.parent], entry.i] for entry in element.atoms(MatrixElement) if entry.parent in reads}
    return element.xreplace(read).as_dummy()


def _summed(summand: sp.Expr, *limits: sp.Tuple) -> sp.Expr:
    """Evaluate a double sum, the sum that was the outer one first."""
    total = sp.Sum(summand, *limits)
    return total.reorder((0, 1)).doit() if len(limits) == 2 else total
