r"""The weight update again, for matrices of any size: SymPy handles $W$ and $\Delta W$ as wholes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, expanded, rewritten
from icl_lib.symbolic.least_norm import FORMULA, SHAPES, SOURCE, assumptions
from icl_lib.symbolic.notation import A_WITH, A_WITHOUT, MULTIPLIERS, SQUARED_NORM, latex, stacked

OUT, IN = sp.symbols("m n", integer=True, positive=True)


@cache
def weight_update_any_size() -> Derivation:
    r"""Derive the weight update without choosing a size.

    $$\Delta W = \frac{W (a_C - a_0)\, a_0^\top}{\|a_0\|^2}$$

    The same problem as in :func:`~icl_lib.symbolic.weight_update`, with matrices as wholes and sizes $m \times n$ that
    stay symbols. Traces take the place of sums over entries, and SymPy's matrix calculus of derivatives by entries.

    Source: Dherin et al., Theorem 2.2; least norm: v4, Theorem 2.3.

    Shapes: the result, $\Delta W$, is a function of ``W`` ``[out, in]``, ``a_without`` ``[in]`` and ``a_with``
    ``[in]``, of any sizes.

    >>> import numpy as np
    >>> derivation = weight_update_any_size()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    array([[1., 1.],
           [0., 0.]])
    """
    W, edit, N = (sp.MatrixSymbol(name, OUT, IN) for name in ("W", r"{\Delta W}", "N"))
    a0, aC = sp.MatrixSymbol(A_WITHOUT, IN, 1), sp.MatrixSymbol(A_WITH, IN, 1)
    multipliers = sp.MatrixSymbol(MULTIPLIERS, OUT, 1)

    def lagrangian(at: sp.MatrixExpr) -> sp.Expr:
        return sp.Trace(at.T * at) / 2 - sp.Trace(multipliers.T * effect(at))

    def effect(at: sp.MatrixExpr) -> sp.MatrixExpr:
        return (W + at) * a0 - W * aC

    # Term by term, since SymPy 1.14 gives zero for the derivative of a sum of traces by a matrix of symbolic size.
    # That the gradient is right is shown by the expansion to second order below, which uses no derivative.
    terms = sp.Add.make_args(lagrangian(edit))
    gradient = expanded(sp.MatAdd(*(term.diff(edit) for term in terms)))
    stationary = solve_affine(gradient, edit)

    remaining = contracted(effect(stationary), a0)
    found = solve_affine(remaining, multipliers)
    update = rewritten(stationary.xreplace({multipliers: found}), W * (aC - a0) * a0.T / sp.Trace(a0.T * a0))

    change = trace_normal_form(lagrangian(edit + N) - lagrangian(edit))
    to_first_order = trace_normal_form(sp.Trace(gradient.T * N))
    to_second_order = rewritten(change - to_first_order, sp.Trace(N.T * N) / 2)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        values = {edit: candidate, multipliers: found}
        nearby = lagrangian(candidate + N) - lagrangian(candidate) - sp.Trace(N.T * N) / 2
        return {
            "effect": contracted(effect(candidate), a0),
            "stationarity": gradient.xreplace(values),
            "least norm": trace_normal_form(nearby.xreplace(values)),
        }

    L = r"\mathcal{L}(\Delta W)"
    return Derivation(
        name="weight_update_any_size",
        source=SOURCE,
        assumptions=assumptions(effect(edit), sp.Trace(edit.T * edit) / 2, sp.Trace(a0.T * a0)),
        steps=(
            Step(
                "Lagrangian",
                lagrangian(edit),
                stacked(f"{L} = {latex(terms[0])}", f"{{}} {latex(terms[1])}"),
                f"The multipliers form one column, ${MULTIPLIERS}$, and a trace adds up the constraints.",
            ),
            Step(
                "Stationarity",
                gradient,
                rf"\nabla {L} = {latex(gradient)} = 0",
                "SymPy differentiates the traces by the matrix $\\Delta W$.",
            ),
            Step(
                "Outer product",
                stationary,
                rf"\Delta W = {latex(stationary)}",
                "The gradient is $\\Delta W$ plus a constant, so it is zero at one place only: there the edit is a "
                "column times a row, which has rank at most one.",
            ),
            Step(
                "What is left to satisfy",
                remaining,
                f"{latex(remaining)} = 0",
                f"We put this edit into the effect; ${A_WITHOUT}^{{\\top}} {A_WITHOUT}$ is a $1 \\times 1$ matrix, "
                f"so it comes out as a number, ${SQUARED_NORM}$.",
            ),
            Step(
                "Multipliers",
                found,
                rf"{MULTIPLIERS} = {latex(found)}",
                f"Here we divide by ${SQUARED_NORM}$, which is not zero because ${A_WITHOUT}$ is not.",
            ),
            Step("Formula", update, FORMULA, f"The multipliers go into ${latex(stationary)}$."),
            Step(
                "Second order",
                change,
                stacked(
                    r"\mathcal{L}(\Delta W + N) - \mathcal{L}(\Delta W)",
                    rf"{{}} = {latex(to_first_order)}",
                    rf"{{}} + {latex(to_second_order)}",
                ),
                "For any $N$, the traces multiply out to a first-order part, zero where the gradient is, and a "
                "squared norm; where the effect holds, $\\mathcal{L}$ is half the squared norm, so every other "
                "edit with the effect is larger.",
            ),
        ),
        result=update,
        latex=FORMULA,
        arguments={"W": W, "a_without": a0, "a_with": aC},
        shapes=SHAPES,
        must_vanish=must_vanish,
    )


def contracted(expression: sp.MatrixExpr, column: sp.MatrixSymbol) -> sp.MatrixExpr:
    r"""Multiply out, and pull each $a^\top a$ out of its product as the number $\operatorname{tr}(a^\top a)$.

    A 1 × 1 matrix is its trace times the 1 × 1 identity; SymPy does not use this by itself.
    """
    square = sp.Trace(column.T * column)
    terms = []
    for term in sp.MatAdd.make_args(expanded(expression)):
        scalar, factors = _factors(term)
        for k in reversed(range(len(factors) - 1)):
            if factors[k : k + 2] == [column.T, column]:
                scalar, factors[k : k + 2] = scalar * square, [sp.Identity(1)]
        terms.append(sp.MatMul(scalar, *factors).doit())
    return sp.MatAdd(*terms).doit()


def solve_affine(expression: sp.MatrixExpr, unknown: sp.MatrixSymbol) -> sp.MatrixExpr:
    """Solve $kX + B = 0$ for $X$, with the number $k$ and the matrix $B$ as SymPy finds them in the expression.

    Raises `ArithmeticError` for an expression that is not of this form.
    """
    constant = expression.xreplace({unknown: sp.ZeroMatrix(*unknown.shape)}).doit()
    number, factors = _factors(expanded(expression - constant))
    if factors != [unknown] or number.has(unknown):
        raise ArithmeticError(f"{expression} is not a number times {unknown} plus a constant")
    return (-constant / number).doit()


def trace_normal_form(expression: sp.Expr) -> sp.Expr:
    r"""Multiply out inside the traces, and write each in one way.

    As $\operatorname{tr}(AB) = \operatorname{tr}(BA)$ and $\operatorname{tr}(A) = \operatorname{tr}(A^\top)$, the trace
    of a product has as many forms as the product has factors, times two; the most readable one stands for all.
    """

    def one_trace(argument: sp.MatrixExpr) -> sp.Expr:
        return sp.Add(*(_sorted_trace(term) for term in sp.MatAdd.make_args(expanded(argument))))

    return sp.expand(expression.replace(sp.Trace, one_trace))


def _sorted_trace(term: sp.MatrixExpr) -> sp.Expr:
    scalar, factors = _factors(term)
    words = (factors, [factor.T for factor in reversed(factors)])
    turned = [word[k:] + word[:k] for word in words for k in range(len(word))]
    return scalar * sp.Trace(sp.MatMul(*max(turned, key=_readability)))


def _factors(term: sp.MatrixExpr) -> tuple[sp.Expr, list[sp.MatrixExpr]]:
    """Split a product into the number in front and the matrices."""
    return term.as_coeff_matrices() if isinstance(term, sp.MatMul) else (sp.S.One, [term])


def _readability(word: list[sp.MatrixExpr]) -> tuple[int, bool, str]:
    """Order the ways to write a trace: few transposes, and one of them in front."""
    transposed = [isinstance(factor, sp.Transpose) for factor in word]
    return -sum(transposed), transposed[0], str(word)
