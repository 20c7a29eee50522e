r"""The bias update: what a skip connection carries past the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten, vanishes
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.notation import A_WITH, A_WITHOUT, first_of, latex, matrix, vector


@lru_cache(maxsize=None, typed=True)
def bias_update(out_features: int, in_features: int) -> Derivation:
    r"""Derive the bias edit of a block with skip connections around its contextual layer and its MLP.

    $$T(C, x) = x + A(C, x) + W' g(W A(C, x) + b) + b' \qquad\Longrightarrow\qquad \Delta b' = a_C - a_0$$

    $W$ has its weight update. The activation $g$ is any function, applied to each entry: SymPy can only be rid of it by
    showing that it reads the same with and without the context.

    Source: Dherin et al., appendix A, Theorem B.2.

    Shapes: $W$ is ``out_features`` × ``in_features``, and its output goes back to ``in_features`` through $W'$. The
    result, $\Delta b'$ ``[in]``, is a function of ``a_without`` ``[in]`` and ``a_with`` ``[in]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> derivation = bias_update(3, 2)
    >>> derivation.check()
    True
    >>> derivation.result.T
    Matrix([[-a_{0,1} + a_{C,1}, -a_{0,2} + a_{C,2}]])
    """
    least = weight_update(out_features, in_features)
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    x, outer_weight = vector("x", in_features), matrix("W'", in_features, out_features)
    hidden_bias, bias, edit = (vector("b", out_features), vector("b'", in_features), vector(r"\Delta b'", in_features))
    g = sp.Function("g")

    def block(weight: sp.MatrixBase, a: sp.MatrixBase, output_bias: sp.MatrixBase) -> sp.MatrixBase:
        return x + a + outer_weight * (weight * a + hidden_bias).applyfunc(g) + output_bias

    # Two applications of g to expressions that SymPy proves equal are one and the same number.
    reads, read_before = (W + least.result) * a0 + hidden_bias, W * aC + hidden_bias
    same = {g(now): g(then) for now, then in zip(reads, read_before, strict=True) if vanishes(now - then)}

    def left_over(candidate: sp.MatrixBase) -> sp.MatrixBase:
        edited = block(W + least.result, a0, bias + candidate).xreplace(same)
        return (edited - block(W, aC, bias)).applyfunc(sp.expand)

    gap = left_over(edit)
    if gap.has(g):
        raise ArithmeticError(f"{g} reads something else with the weight update than with the context")
    update = edit.xreplace(sp.solve(list(gap), list(edit)))

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {"effect": left_over(candidate)}

    return Derivation(
        name="bias_update",
        source="Dherin et al. 2025 (arXiv 2507.16003), appendix A, Theorem B.2",
        assumptions=(
            Step(
                "Block",
                block(W, aC, bias),
                r"T_{W,\,b'}(\boldsymbol{a}) = x + \boldsymbol{a} + W' g(W \boldsymbol{a} + b) + b'",
                "The query $x$ and what the contextual layer reads, $\\boldsymbol{a}$, skip over the MLP; its "
                "activation $g$ may be any function, applied to each entry.",
            ),
            Step(
                "Weight update",
                least.result,
                least.latex,
                f"The first layer has its weight update already, which needs ${A_WITHOUT} \\neq \\boldsymbol{{0}}$.",
            ),
            Step(
                "Effect",
                sp.Eq(block(W + least.result, a0, bias + edit), block(W, aC, bias)),
                rf"T_{{W + \Delta W,\, b' + \Delta b'}}({A_WITHOUT}) = T_{{W,\,b'}}({A_WITH})",
                "The edited block shall answer without the context as the block answered with it.",
            ),
        ),
        steps=(
            Step(
                "What g reads",
                rewritten(reads, read_before),
                rf"(W + \Delta W)\, {A_WITHOUT} + b = W {A_WITH} + b",
                "With the weight update the activation reads the same as with the context, in every one of the "
                f"{out_features} hidden features, so it returns the same, whatever function it is.",
            ),
            Step(
                "What is left",
                gap,
                f"{latex(gap[0])} = 0",
                f"We subtract the two sides of the effect: $x$, $b'$ and all of the MLP cancel. "
                f"{first_of(len(gap), 'entry', 'entries')}",
            ),
            Step(
                "Bias update",
                update,
                f"{latex(edit[0])} = {latex(update[0])}",
                "SymPy solves for the bias: it takes over the part of the context that went past the weights.",
            ),
        ),
        result=update,
        latex=rf"\Delta b' = {A_WITH} - {A_WITHOUT}",
        arguments={"a_without": a0, "a_with": aC},
        shapes={"a_without": "in", "a_with": "in", "return": "in"},
        must_vanish=must_vanish,
    )
