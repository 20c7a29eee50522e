r"""The weight update, entry by entry: the smallest edit of the weights that does what the context did."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import (
    A_WITH,
    A_WITHOUT,
    DIFFERENCE,
    MULTIPLIERS,
    SQUARED_NORM,
    checked_sizes,
    first_of,
    latex,
    matrix,
    over_squared_norm,
    positive_unless_zero,
    put,
    squared_norm,
    stacked,
    vector,
)

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), Theorem 2.2"
SHAPES = {"W": "out in", "a_without": "in", "a_with": "in", "return": "out in"}
FORMULA = rf"\Delta W = \frac{{W ({A_WITH} - {A_WITHOUT})\, {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}"


@lru_cache(maxsize=None, typed=True)
def weight_update(out_features: int, in_features: int) -> Derivation:
    r"""Derive the smallest weight edit that has the effect of the context.

    $$\Delta W = \frac{W (a_C - a_0)\, a_0^\top}{\|a_0\|^2}$$

    Nothing about the form of $\Delta W$ is assumed. SymPy minimises $\tfrac12\|\Delta W\|_F^2$ under the constraint
    $(W + \Delta W)\, a_0 = W a_C$, with one multiplier for each row; rank one and the formula come out.

    Source: Dherin et al., Theorem 2.2; least norm: v4, Theorem 2.3.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $\Delta W$, is a function of ``W`` ``[out, in]``,
    ``a_without`` ``[in]`` and ``a_with`` ``[in]``.

    Raises `ValueError` for a size that is not a whole number of at least 1. SymPy takes less than a second for 4 × 3.

    >>> derivation = weight_update(1, 2)
    >>> derivation.check()
    True
    >>> derivation.result[0, 0]
    a_{0,1}*(W_{1,1}*(-a_{0,1} + a_{C,1}) + W_{1,2}*(-a_{0,2} + a_{C,2}))/(a_{0,1}**2 + a_{0,2}**2)
    """
    checked_sizes(out_features=out_features, in_features=in_features)
    W = matrix("W", out_features, in_features)
    edit = matrix(r"\Delta W", out_features, in_features)
    a0, aC = vector("a", in_features, "0"), vector("a", in_features, "C")
    multipliers, difference = vector(r"\lambda", out_features), vector(r"\delta", in_features)
    entries, rows = list(edit), list(multipliers)

    effect = (W + edit) * a0 - W * aC
    objective = squared_norm(edit) / 2
    lagrangian = objective - (multipliers.T * effect)[0]

    gradient = sp.ImmutableMatrix(out_features, in_features, [sp.diff(lagrangian, entry) for entry in entries])
    stationary = edit.xreplace(sp.solve(list(gradient), entries))
    outer_product = rewritten(stationary, multipliers * a0.T)
    minors = two_by_two_minors(outer_product)

    # Writing a_C = a_0 + δ only gives the difference a name.
    remaining = put(effect, (edit, outer_product), (aC, a0 + difference)).applyfunc(sp.expand)
    divisor = rewritten(sp.diff(remaining[0], rows[0]), squared_norm(a0))
    if not positive_unless_zero(a0):
        raise ArithmeticError(f"{divisor} may be zero, and SymPy is about to divide by it")
    solved = multipliers.xreplace(sp.solve(list(remaining), rows))
    found = put(rewritten(solved, W * difference / divisor), (difference, aC - a0))
    update = put(outer_product, (multipliers, found))

    hessian = rewritten(sp.hessian(lagrangian, entries), sp.eye(len(entries)))
    N = matrix("N", out_features, in_features)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        at_candidate = put(lagrangian, (edit, candidate), (multipliers, found))
        nearby = put(lagrangian, (edit, candidate + N), (multipliers, found))
        return {
            "effect": put(effect, (edit, candidate)),
            "stationarity": put(gradient, (edit, candidate), (multipliers, found)),
            "least norm": nearby - at_candidate - squared_norm(N) / 2,
            "rank one": sp.ImmutableMatrix(two_by_two_minors(candidate)),
        }

    return Derivation(
        name="weight_update",
        source=SOURCE,
        assumptions=assumptions(effect, objective, divisor),
        steps=(
            Step(
                "Lagrangian",
                lagrangian,
                stacked(
                    r"\mathcal{L}(\Delta W) = \tfrac12 \|\Delta W\|_F^2",
                    rf"{{}} - \sum_i \lambda_i \bigl((W + \Delta W)\, {A_WITHOUT} - W {A_WITH}\bigr)_i",
                ),
                "Each row of the effect is one constraint, and each constraint gets a multiplier $\\lambda_i$.",
            ),
            Step(
                "Stationarity",
                gradient,
                rf"\frac{{\partial \mathcal{{L}}}}{{\partial {latex(entries[0])}}} = {latex(gradient[0])} = 0",
                f"At the smallest edit the derivative by every entry is zero. {first_of(len(entries), 'equation')}",
            ),
            Step(
                "Outer product",
                outer_product,
                stacked(
                    f"{latex(entries[0])} = {latex(outer_product[0])}",
                    rf"\Delta W = {MULTIPLIERS}\, {A_WITHOUT}^{{\top}}",
                ),
                f"Solving for the {len(entries)} entries gives a column times a row; no such form was assumed.",
            ),
            Step(
                "Rank one",
                sp.ImmutableMatrix(minors),
                _first_minor(outer_product) if minors else r"\operatorname{rank} \Delta W \le 1",
                f"The rank is at most one when every $2 \\times 2$ minor is zero: all {len(minors)} of them are. "
                f"{first_of(len(minors), 'minor')}"
                if minors
                else "With a single row or a single column, the rank cannot be more than one.",
            ),
            Step(
                "What is left to satisfy",
                remaining,
                stacked(
                    rf"\bigl({latex(divisor)}\bigr)\, {latex(rows[0])}",
                    f"{{}} = {latex(sp.expand(divisor * rows[0] - remaining[0]))}",
                ),
                f"We put this edit into the effect and write ${DIFFERENCE} = {A_WITH} - {A_WITHOUT}$. "
                f"{first_of(len(rows), 'equation')}",
            ),
            Step(
                "Multipliers",
                found,
                stacked(
                    f"{latex(rows[0])} = {over_squared_norm(solved[0], a0)}",
                    rf"{MULTIPLIERS} = \frac{{W {DIFFERENCE}}}{{{SQUARED_NORM}}}",
                ),
                f"Here we divide by ${SQUARED_NORM}$, a sum of squares that SymPy proves positive as soon as one "
                f"entry of ${A_WITHOUT}$ is not zero: this is where that assumption is used.",
            ),
            Step(
                "Formula",
                update,
                FORMULA,
                f"The multipliers go into ${MULTIPLIERS}\\, {A_WITHOUT}^{{\\top}}$.",
            ),
            Step(
                "Second order",
                hessian,
                stacked(
                    rf"\nabla^2 \mathcal{{L}} = I_{{{len(entries)}}}",
                    r"\mathcal{L}(\Delta W + N) = \mathcal{L}(\Delta W) + \tfrac12 \|N\|_F^2",
                ),
                "The Hessian is the identity, so a step $N$ away costs $\\tfrac12\\|N\\|_F^2$; where the effect "
                "holds, $\\mathcal{L}$ is half the squared norm, so every other edit with the effect is larger.",
            ),
        ),
        result=update,
        latex=FORMULA,
        arguments={"W": W, "a_without": a0, "a_with": aC},
        shapes=SHAPES,
        must_vanish=must_vanish,
    )


def assumptions(effect: Any, objective: sp.Expr, divisor: sp.Expr) -> tuple[Step, ...]:
    """Return what both derivations of the weight update assume, with the SymPy objects of the one that asks."""
    return (
        Step(
            "Effect",
            effect,
            rf"(W + \Delta W)\, {A_WITHOUT} = W {A_WITH}",
            f"With the edit, the layer answers to ${A_WITHOUT}$, what it reads without the context, as it "
            f"answered to ${A_WITH}$, what it read with it.",
        ),
        Step(
            "Smallest edit",
            objective,
            r"\text{minimise}\quad \tfrac12 \|\Delta W\|_F^2",
            "Many edits have this effect; we ask for the one that changes the weights least.",
        ),
        Step(
            "Something to read",
            sp.Ne(divisor, 0),
            rf"{A_WITHOUT} \neq \boldsymbol{{0}}",
            f"If ${A_WITHOUT}$ were zero, no edit of the weights could change the answer to it.",
        ),
    )


def two_by_two_minors(of: sp.MatrixBase) -> list[sp.Expr]:
    """Return all 2 × 2 minors, expanded.

    >>> two_by_two_minors(sp.Matrix([[1, 2, 3], [2, 4, 7]]))
    [0, 1, 2]
    """
    return [
        sp.expand(of.extract(list(rows), list(columns)).det())
        for rows in combinations(range(of.rows), 2)
        for columns in combinations(range(of.cols), 2)
    ]


def _first_minor(of: sp.MatrixBase) -> str:
    """Write out the top left minor, before its two products cancel."""
    return (
        f"({latex(of[0, 0])})({latex(of[1, 1])}) - ({latex(of[0, 1])})({latex(of[1, 0])})"
        f" = {latex(two_by_two_minors(of)[0])}"
    )
