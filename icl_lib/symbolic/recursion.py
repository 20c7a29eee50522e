r"""Attention reads an average, so one more token moves what is read a part of the way to the token's own value."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.attention import DIM
from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import latex, stacked

BEFORE, NOW, VALUE = r"\boldsymbol{a}_{i-1}", r"\boldsymbol{a}_i", r"\boldsymbol{v}_i"
SOFTMAX_FORMULA = rf"{NOW} = {BEFORE} + \alpha_i\, ({VALUE} - {BEFORE})"
RATE = sp.Symbol(r"\alpha_i", positive=True)
TOKEN = sp.Symbol("i", integer=True, positive=True)
ENTRY, INDEX, OTHER = sp.symbols("k j l", integer=True, nonnegative=True)
SCORES, VALUES = sp.IndexedBase("s", real=True), sp.IndexedBase("v", real=True)


@cache
def softmax_recursion() -> Derivation:
    r"""Derive how softmax attention goes from $i - 1$ tokens to $i$: towards the new value, by its attention weight.

    $$a_i = a_{i-1} + \alpha_i\, (v_i - a_{i-1}), \qquad \alpha_i = \frac{e^{s_i}}{\sum_{j=0}^{i} e^{s_j}}$$

    This is one head: $a_i$ averages the values $v_j = W_O W_V t_j$ of the query, which is token 0, and of the first $i$
    tokens of the context. A new token must leave the scores $s_j$ and the values of the others as they were, which
    fails if it shifts their positions. Nothing else is assumed of them; the number $i$ stays a symbol.

    Source: this book; softmax attention: Vaswani et al. 2017 (arXiv 1706.03762), equation 1.

    Shapes: the result, $a_i$, is a function of ``alpha`` ``[]``, which is $\alpha_i$, ``a_before`` ``[dim]`` and ``v``
    ``[dim]``, of any size.

    >>> import numpy as np
    >>> derivation = softmax_recursion()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array(0.25), np.array([4.0, 0.0]), np.array([0.0, 8.0]))
    array([3., 2.])
    """

    def weight(of: sp.Expr, among: sp.Expr) -> sp.Expr:
        return sp.exp(SCORES[of]) / sp.Sum(sp.exp(SCORES[OTHER]), (OTHER, 0, among))

    def read(among: sp.Expr) -> sp.Expr:
        return sp.Sum(weight(INDEX, among) * VALUES[INDEX, ENTRY], (INDEX, 0, among))

    share = split_off(weight(TOKEN, TOKEN))
    before, now = canonical(read(TOKEN - 1)), split_off(read(TOKEN))
    kept = rewritten(split_off(weight(INDEX, TOKEN)), (1 - share) * canonical(weight(INDEX, TOKEN - 1)))

    # The old tokens appear in two sums only, and these are what α and the last read determine.
    total, weighted = sp.Dummy("Z"), sp.Dummy("N")
    was, value = sp.Symbol("a", real=True), VALUES[TOKEN, ENTRY]
    sums = {canonical(sp.denom(before)): total, canonical(sp.numer(before)): weighted}
    [solved] = sp.solve([share.xreplace(sums) - RATE, before.xreplace(sums) - was], [total, weighted], dict=True)
    found = rewritten(now.xreplace(sums).xreplace(solved), was + RATE * (value - was))

    a_before, v = sp.MatrixSymbol(BEFORE, DIM, 1), sp.MatrixSymbol(VALUE, DIM, 1)
    result = a_before + RATE * (v - a_before)
    in_entries = {v[ENTRY, 0]: value, a_before[ENTRY, 0]: was}
    rewritten(found, result[ENTRY, 0].xreplace(in_entries))

    same = sp.Symbol("s", real=True)
    uniform = weight(TOKEN, TOKEN).replace(sp.Indexed, lambda *_: same).doit()

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        here = candidate[ENTRY, 0].xreplace(in_entries)
        return {"definition": here.xreplace({RATE: share, was: before}) - now}

    return Derivation(
        name="softmax_recursion",
        source="This book; softmax attention: Vaswani et al. 2017 (arXiv 1706.03762), equation 1",
        assumptions=(
            Step(
                "Attention weights",
                weight(INDEX, TOKEN),
                stacked(
                    r"\alpha_{i,j} = \frac{e^{s_j}}{\sum_{l=0}^{i} e^{s_l}}",
                    r"\alpha_i = \alpha_{i,i}",
                ),
                "Token 0 is the query, and $i$ tokens of the context follow. The scores $s_j$ may be any numbers, but "
                "a new token leaves those of the others as they were.",
            ),
            Step(
                "What is read",
                read(TOKEN),
                rf"{NOW} = \sum_{{j=0}}^{{i}} \alpha_{{i,j}}\, \boldsymbol{{v}}_j",
                "One head of attention averages the values with these weights; here we take any one entry $k$ of them.",
            ),
        ),
        steps=(
            Step(
                "The new token",
                share,
                stacked(r"\alpha_i = \frac{e^{s_i}}{Z + e^{s_i}}", r"Z = \sum_{j=0}^{i-1} e^{s_j}"),
                "SymPy splits the last term off the sum, for any $i$, and this is the attention weight of the token "
                "that comes last.",
            ),
            Step(
                "The others",
                kept,
                r"\alpha_{i,j} = (1 - \alpha_i)\, \alpha_{i-1,j}",
                "For $j < i$: what the new token gets is taken from all others in proportion.",
            ),
            Step(
                "Two sums",
                (now, before),
                stacked(
                    r"a_{i-1} = \frac{N}{Z}",
                    r"a_i = \frac{N + e^{s_i} v_i}{Z + e^{s_i}}",
                    r"N = \sum_{j=0}^{i-1} e^{s_j} v_j",
                ),
                "The last term is split off the other sum as well; this is one entry. All earlier tokens are in $Z$ "
                "and $N$.",
            ),
            Step(
                "Solved",
                tuple(solved.values()),
                stacked(r"Z = \frac{1 - \alpha_i}{\alpha_i}\, e^{s_i}", r"N = a_{i-1} Z"),
                "SymPy solves for both: all that matters of the earlier tokens is what was read and how much weight is "
                "left.",
            ),
            Step(
                "Recursion",
                found,
                r"a_i = a_{i-1} + \alpha_i\, (v_i - a_{i-1})",
                "Put into $a_i$, the score cancels. It is the same for every entry, since weights are numbers.",
            ),
            Step(
                "Uniform attention",
                uniform,
                rf"s_0 = \dots = s_i \quad\Longrightarrow\quad \alpha_i = {latex(uniform)}",
                "With equal scores the weight is one over the number of tokens, the query included: the plain mean, "
                "token by token.",
            ),
        ),
        result=result,
        latex=SOFTMAX_FORMULA,
        arguments={"alpha": RATE, "a_before": a_before, "v": v},
        shapes={"alpha": "", "a_before": "dim", "v": "dim", "return": "dim"},
        must_vanish=must_vanish,
    )


def canonical(expression: sp.Expr) -> sp.Expr:
    """Take out of each sum what does not depend on its index, and call every index by one name."""
    return sp.factor_terms(expression).as_dummy()


def split_off(expression: sp.Expr) -> sp.Expr:
    """Split the last term off every sum in an expression; SymPy puts the two parts together again to prove it."""
    return canonical(expression).replace(sp.Sum, _without_last)


def _without_last(summand: sp.Expr, limits: sp.Tuple) -> sp.Expr:
    index, first, last = limits
    before, alone = (sp.Sum(summand, (index, *ends)) for ends in ((first, last - 1), (last, last)))
    if sp.simplify(before + alone) != sp.Sum(summand, limits):
        raise ArithmeticError(f"{before} and {alone} are not all of the sum")
    return before + alone.doit()
