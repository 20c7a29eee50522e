r"""All edits with the effect of the context, and why one of them is the smallest."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.any_size import IN, OUT, trace_normal_form
from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.notation import (
    A_WITH,
    A_WITHOUT,
    DIFFERENCE,
    MULTIPLIERS,
    SQUARED_NORM,
    first_of,
    inner,
    latex,
    matrix,
    positive_unless_zero,
    put,
    squared_norm,
    stacked,
    vector,
)

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 4, Theorem 2.3"
PROJECTOR = rf"\Bigl(I - \frac{{{A_WITHOUT} {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}\Bigr)"


@lru_cache(maxsize=None, typed=True)
def solution_set(out_features: int, in_features: int) -> Derivation:
    r"""Derive all weight edits that have the effect of the context.

    $$X = \Delta W + M \left(I - \frac{a_0 a_0^\top}{\|a_0\|^2}\right), \qquad M \text{ any matrix}$$

    Each of these has the effect, and each edit $X$ with the effect is one of these, with $M = X - \Delta W$. Which
    entry of $a_0$ is not zero is not known, so SymPy solves for each column of $X$ in turn.

    Source: Dherin et al., v4, Theorem 2.3.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $X$, is a function of ``W`` ``[out, in]``,
    ``a_without`` ``[in]``, ``a_with`` ``[in]`` and ``M`` ``[out, in]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = solution_set(1, 2)
    >>> derivation.check()
    True
    >>> W, a0, aC, M = np.ones((1, 2)), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.array([[5.0, 7.0]])
    >>> derivation.lambdify()(W, a0, aC, M)
    array([[6., 7.]])
    """
    least = weight_update(out_features, in_features)
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    M, X = matrix("M", out_features, in_features), matrix("X", out_features, in_features)

    # With a_C = 0, the weight update of M is the smallest edit that makes M send a_0 to zero.
    blinded = M + put(least.result, (W, M), (aC, sp.zeros(in_features, 1)))
    rest = rewritten(blinded, M * (sp.eye(in_features) - a0 * a0.T / squared_norm(a0)))
    every = least.result + rest

    effect = (W + X) * a0 - W * aC
    solved = [X.xreplace(sp.solve(list(effect), list(X[:, k]))) for k in range(in_features)]
    free = solved[0].free_symbols & set(X)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        conditions = {"effect": put(effect, (X, candidate))}
        for k, solution in enumerate(solved, start=1):
            found_again = put(candidate, (M, solution - least.result))
            conditions[f"every solution, where a_0 has a non-zero entry {k}"] = found_again - solution
        return conditions

    return Derivation(
        name="solution_set",
        source=SOURCE,
        assumptions=(
            Step(
                "Effect",
                effect,
                rf"(W + X)\, {A_WITHOUT} = W {A_WITH}",
                "We ask for every edit $X$ with the effect of the context, large or small.",
            ),
            least.step("Something to read"),
        ),
        steps=(
            Step(
                "One solution",
                least.result,
                least.latex,
                "The weight update, derived before, is one of them.",
            ),
            Step(
                "What leaves the effect alone",
                rest,
                stacked(rf"N = M {PROJECTOR}", rf"N {A_WITHOUT} = \boldsymbol{{0}}"),
                f"Take any matrix $M$ and make it send ${A_WITHOUT}$ to zero: the smallest edit that does so is "
                f"the weight update again, with $M$ for $W$ and zero for ${A_WITH}$, and it leaves $N$.",
            ),
            Step(
                "Each of these has the effect",
                rewritten(put(effect, (X, every)), sp.zeros(out_features, 1)),
                rf"(W + \Delta W + N)\, {A_WITHOUT} - W {A_WITH} = \boldsymbol{{0}}",
                "SymPy multiplies out, and everything cancels.",
            ),
            Step(
                "Every solution",
                tuple(solved),
                f"{latex(X[0])} = {_first_solution(solved[0], W, a0, aC)}",
                f"Where ${latex(a0[0])}$ is not zero, SymPy can solve the effect for the first column of $X$, and "
                f"{len(free)} of the {len(X)} entries stay free. Some entry of ${A_WITHOUT}$ is not zero, so one of "
                f"the columns always works, and SymPy solves for each of the {in_features}. "
                f"{first_of(len(effect), 'row')} As before, ${DIFFERENCE} = {A_WITH} - {A_WITHOUT}$.",
            ),
            Step(
                "None is missing",
                every,
                rf"\Delta W + (X - \Delta W) {PROJECTOR} = X",
                "With $M = X - \\Delta W$ in the formula, each of these solutions gives itself back.",
            ),
        ),
        result=every,
        latex=rf"X = \Delta W + M {PROJECTOR}",
        arguments={**least.arguments, "M": M},
        shapes={**least.shapes, "M": "out in"},
        must_vanish=must_vanish,
    )


@lru_cache(maxsize=None, typed=True)
def uniqueness(out_features: int, in_features: int) -> Derivation:
    r"""Derive that the weight update is the only smallest edit: Pythagoras, for edits.

    $$\|\Delta W + N\|_F^2 = \|\Delta W\|_F^2 + \|N\|_F^2 \qquad \text{for every } N \text{ with } N a_0 = 0$$

    Source: Dherin et al., v4, Theorem 2.3.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result is a number, the squared norm of the solution that
    :func:`~icl_lib.symbolic.solution_set` gives for $M$: a function of ``W`` ``[out, in]``, ``a_without`` ``[in]``,
    ``a_with`` ``[in]`` and ``M`` ``[out, in]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = uniqueness(1, 2)
    >>> derivation.check()
    True
    >>> W, a0, aC, M = np.ones((1, 2)), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.array([[5.0, 7.0]])
    >>> float(derivation.lambdify()(W, a0, aC, M))  # 6² + 7²
    85.0
    """
    least, solutions = weight_update(out_features, in_features), solution_set(out_features, in_features)
    rest = solutions.step("What leaves the effect alone").expression
    outer_product = least.step("Outer product").expression
    a0, N = least.arguments["a_without"], matrix("N", out_features, in_features)
    multipliers = vector(r"\lambda", out_features)

    cross = rewritten(inner(outer_product, N), inner(multipliers, N * a0))
    if not positive_unless_zero(N):
        raise ArithmeticError("SymPy does not prove the squared norm of a non-zero N positive")

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "cross term": inner(least.result, rest),
            "squared norm": squared_norm(solutions.result) - candidate,
        }

    return Derivation(
        name="uniqueness",
        source=SOURCE,
        assumptions=(
            Step(
                "Another solution",
                N * a0,
                stacked(r"X = \Delta W + N", rf"N {A_WITHOUT} = \boldsymbol{{0}}"),
                "Every other edit with the effect differs from the weight update by such an $N$, not zero: this is "
                "`solution_set`.",
            ),
            least.step("Something to read"),
        ),
        steps=(
            Step(
                "Expansion",
                squared_norm(outer_product + N),
                stacked(
                    r"\|\Delta W + N\|_F^2 = \|\Delta W\|_F^2",
                    r"{} + 2\, \langle \Delta W, N \rangle + \|N\|_F^2",
                ),
                "The squared norm of a sum has a cross term, twice the sum of the products of the entries.",
            ),
            Step(
                "Cross term",
                cross,
                stacked(
                    r"\langle \Delta W, N \rangle = \sum_{i,j} \lambda_i\, a_{0,j} N_{i,j}",
                    rf"{{}} = {MULTIPLIERS}^{{\top}} (N {A_WITHOUT}) = 0",
                ),
                rf"The weight update is ${MULTIPLIERS}\, {A_WITHOUT}^{{\top}}$, so all that the cross term contains of "
                f"$N$ is $N {A_WITHOUT}$, which is zero.",
            ),
            Step(
                "At any size",
                _cross_term_at_any_size(),
                stacked(
                    rf"\operatorname{{tr}}\bigl(({MULTIPLIERS} {A_WITHOUT}^{{\top}})^{{\top}} N\bigr)",
                    f"{{}} = {latex(_cross_term_at_any_size())}",
                ),
                "The same with matrices as wholes: a trace does not change when its factors go round, and again "
                f"$N {A_WITHOUT}$ appears.",
            ),
            Step(
                "Nothing else is as small",
                squared_norm(N),
                r"\|N\|_F^2 > 0 \quad\text{unless}\quad N = 0",
                "SymPy proves the sum of squares positive as soon as one entry of $N$ is not zero, so every other "
                "edit with the effect is larger.",
            ),
        ),
        result=squared_norm(least.result) + squared_norm(rest),
        latex=r"\|\Delta W + N\|_F^2 = \|\Delta W\|_F^2 + \|N\|_F^2",
        arguments=solutions.arguments,
        shapes={**solutions.shapes, "return": ""},
        must_vanish=must_vanish,
    )


def _cross_term_at_any_size() -> sp.Expr:
    """Return the inner product of the outer product with N, the sizes being symbols, in normal form."""
    multipliers, a0 = sp.MatrixSymbol(MULTIPLIERS, OUT, 1), sp.MatrixSymbol(A_WITHOUT, IN, 1)
    return trace_normal_form(sp.Trace((multipliers * a0.T).T * sp.MatrixSymbol("N", OUT, IN)))


def _first_solution(solved: sp.MatrixBase, W: sp.MatrixBase, a0: sp.MatrixBase, aC: sp.MatrixBase) -> str:
    """Write the first entry of a solution with $W(a_C - a_0)$ called by that name."""
    product = sp.Symbol(rf"(W {DIFFERENCE})_{{1}}")
    named = sp.expand(solved[0] * a0[0] - (W * (aC - a0))[0]) + product
    return rf"\frac{{{latex(named)}}}{{{latex(a0[0])}}}"
