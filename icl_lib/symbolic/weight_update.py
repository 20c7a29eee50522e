r"""The weight update: the edit of least norm that gives the layer the pre-activation that it has with the context."""

from __future__ import annotations

from functools import cache, lru_cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, First, Identity, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import (
    IN,
    OUT,
    checked_sizes,
    column,
    dot,
    entries,
    latex,
    matrix,
    number,
    squared_norm,
    vector,
)

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 1, Theorem 2.2; least norm: version 4, Theorem 2.3"
SHAPES = {"W": "out in", "a_without": "in", "a_with": "in", "return": "out in"}


@lru_cache(maxsize=None, typed=True)
def weight_update(out_features: int | None = None, in_features: int | None = None) -> Derivation:
    r"""Derive the edit of least norm that reproduces the pre-activation with the context.

    $$\Delta W = \frac{W (a_C - a_0)\, a_0^\top}{\|a_0\|^2}$$

    Nothing about the form of $\Delta W$ is assumed. SymPy minimises $\tfrac12\|\Delta W\|_F^2$ under the constraint
    $(W + \Delta W)\, a_0 = W a_C$; rank one and the formula come out.

    Without sizes the matrices stay whole and their sizes are symbols, so the derivation holds for all sizes. With
    sizes, $W$ is ``out_features`` × ``in_features`` and SymPy solves for every entry.

    Source: Dherin et al. (arXiv 2507.16003), version 1, Theorem 2.2; least norm: version 4, Theorem 2.3.

    Shapes: the result, $\Delta W$, is a function of ``W`` ``[out, in]``, ``a_without`` ``[in]`` and ``a_with``
    ``[in]``.

    Raises `ValueError` for one size without the other, and for a size that is not a whole number of at least 1. SymPy
    takes less than a second for 4 × 3.

    >>> derivation = weight_update(1, 2)
    >>> derivation.check(), weight_update().check()
    (True, True)
    >>> derivation.result[0, 0]
    a_{0,1}*(W_{1,1}*(-a_{0,1} + a_{C,1}) + W_{1,2}*(-a_{0,2} + a_{C,2}))/(a_{0,1}**2 + a_{0,2}**2)
    """
    if out_features is None and in_features is None:
        return _of_any_size()
    checked_sizes(out_features=out_features, in_features=in_features)
    return _entry_by_entry(out_features, in_features)


class Problem:
    """The symbols of the problem, what is asked, and what is to be minimised."""

    def __init__(self, out_features: object = OUT, in_features: object = IN) -> None:
        self.W, self.edit = matrix("W", out_features, in_features), matrix(r"\Delta W", out_features, in_features)
        self.a_0, self.a_C = vector("a", in_features, "0"), vector("a", in_features, "C")
        self.multipliers = vector(r"\lambda", out_features)
        self.lagrangian_name = number(r"\mathcal{L}(\Delta W)")
        self.lagrangian = squared_norm(self.edit) / 2 - dot(self.multipliers, self.effect(self.edit))

    def effect(self, edit: sp.MatrixExpr) -> sp.MatrixExpr:
        """Return what the constraint asks to be zero."""
        return (self.W + edit) * self.a_0 - self.W * self.a_C

    def update(self) -> sp.MatrixExpr:
        """Return the formula, to be compared with what is derived."""
        return self.W * (self.a_C - self.a_0) * self.a_0.T / squared_norm(self.a_0)

    def assumptions(self) -> tuple[Step, ...]:
        """Return what both derivations assume."""
        return (
            Step(
                "effect",
                "Same pre-activation",
                f"The edited layer, given ${latex(self.a_0)}$ (read without the context), returns what the original "
                f"layer returns for ${latex(self.a_C)}$ (read with the context).",
                Asked((self.W + self.edit) * self.a_0, self.W * self.a_C),
            ),
            Step(
                "least norm",
                "Least norm",
                "Many edits do this. We ask for the one that changes the weights least.",
                Minimise(squared_norm(self.edit) / 2),
            ),
            Step(
                "nonzero",
                "Nonzero activation",
                f"If ${latex(self.a_0)}$ were zero, every edit would map it to zero.",
                Nonzero(self.a_0),
            ),
        )


@cache
def _of_any_size() -> Derivation:
    problem = Problem()
    W, edit, a_0, a_C, multipliers = problem.W, problem.edit, problem.a_0, problem.a_C, problem.multipliers
    change, slope = matrix("N"), matrix(r"\nabla\mathcal{L}(\Delta W)")
    nearby = number(r"\mathcal{L}(\Delta W + N)")

    stationary = solved(gradient(problem.lagrangian, edit), edit)
    outer_product = rewritten(stationary, multipliers * a_0.T)
    remaining = expanded(problem.effect(outer_product))
    found = rewritten(solved(remaining, multipliers), W * (a_C - a_0) / squared_norm(a_0))
    update = rewritten(outer_product.xreplace({multipliers: found}), problem.update())

    return Derivation(
        name="weight_update",
        source=SOURCE,
        assumptions=problem.assumptions(),
        steps=(
            Step(
                "lagrangian",
                "Lagrangian",
                f"The multipliers of the constraint form a column, ${latex(multipliers)}$.",
                Identity(problem.lagrangian_name, problem.lagrangian),
            ),
            Step(
                "stationarity",
                "Stationarity",
                "At a minimum the gradient with respect to $\\Delta W$ is zero.",
                Identity(slope, edit - multipliers * a_0.T),
                Asked(slope, sp.ZeroMatrix(OUT, IN)),
            ),
            Step(
                "outer product",
                "Outer product",
                "So the edit is a column times a row. **Its rank is at most one**, although no such form was assumed.",
                Asked(edit, outer_product),
            ),
            Step(
                "constraint",
                "What remains of the constraint",
                "We put this edit into the constraint.",
                Asked(squared_norm(a_0) * multipliers, W * (a_C - a_0)),
            ),
            Step(
                "multipliers",
                "Multipliers",
                f"Here we divide by ${latex(squared_norm(a_0))}$, which is not zero because ${latex(a_0)}$ is not.",
                Asked(multipliers, found),
            ),
            Step(
                "formula",
                "Formula",
                f"The multipliers go into ${latex(outer_product)}$.",
                Asked(edit, update),
            ),
            Step(
                "second order",
                "Minimum",
                "The Lagrangian is quadratic in the edit. At the stationary point, with these multipliers, its "
                "gradient is zero, so adding any $N$ raises it by half the squared norm of $N$. Where the constraint "
                "holds, the Lagrangian is half the squared norm of the edit. So every other edit that satisfies the "
                "constraint is larger.",
                Identity(nearby, problem.lagrangian_name + dot(slope, change) + squared_norm(change) / 2),
                Asked(nearby - problem.lagrangian_name, squared_norm(change) / 2),
            ),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, problem.update()),
        arguments={"W": W, "a_without": a_0, "a_with": a_C},
        shapes=SHAPES,
        names={
            problem.lagrangian_name: problem.lagrangian,
            slope: gradient(problem.lagrangian, edit),
            nearby: problem.lagrangian.xreplace({edit: edit + change}),
        },
        solution={multipliers: found},
    )


@cache
def _entry_by_entry(out_features: int, in_features: int) -> Derivation:
    problem = Problem(out_features, in_features)
    W, edit = entries("W", out_features, in_features), entries(r"\Delta W", out_features, in_features)
    a_0, a_C = column("a", in_features, "0"), column("a", in_features, "C")
    multipliers = column(r"\lambda", out_features)
    symbols = {problem.W: W, problem.a_0: a_0, problem.a_C: a_C, problem.multipliers: multipliers}

    effect = (W + edit) * a_0 - W * a_C
    square = (a_0.T * a_0)[0]
    lagrangian = sum(entry**2 for entry in edit) / 2 - (multipliers.T * effect)[0]
    gradient_entries = sp.ImmutableMatrix(*edit.shape, [sp.diff(lagrangian, entry) for entry in edit])
    stationary = edit.xreplace(sp.solve(list(gradient_entries), list(edit)))
    outer_product = rewritten(stationary, multipliers * a_0.T)

    remaining = effect.xreplace(dict(zip(edit, outer_product, strict=True))).applyfunc(sp.expand)
    if not all(square.xreplace({entry: sp.Dummy(real=True, zero=False)}).is_positive for entry in a_0):
        raise ArithmeticError(f"{square} may be zero, and SymPy is about to divide by it")
    solution = sp.solve(list(remaining), list(multipliers))
    found = rewritten(multipliers.xreplace(solution), W * (a_C - a_0) / square)
    update = outer_product.xreplace(dict(zip(multipliers, found, strict=True)))
    derivatives = entries(r"\frac{\partial \mathcal{L}}{\partial \Delta W", out_features, in_features)
    derivatives = derivatives.applyfunc(lambda symbol: sp.Symbol(f"{symbol.name}}}", real=True))

    return Derivation(
        name="weight_update",
        source=SOURCE,
        assumptions=problem.assumptions(),
        steps=(
            Step(
                "lagrangian",
                "Lagrangian",
                "Each row of the constraint gets a multiplier $\\lambda_i$.",
                Identity(problem.lagrangian_name, problem.lagrangian),
            ),
            Step(
                "stationarity",
                "Stationarity",
                "At a minimum the derivative with respect to every entry is zero. " + _first_of(len(edit), "equation"),
                First(derivatives, gradient_entries, sp.zeros(*edit.shape)),
            ),
            Step(
                "outer product",
                "Outer product",
                f"SymPy solves for the {len(edit)} entries. The solution is a column times a row. **Its rank is at "
                "most one**, although no such form was assumed.",
                First(edit, outer_product),
                Asked(problem.edit, problem.multipliers * problem.a_0.T),
            ),
            Step(
                "constraint",
                "What remains of the constraint",
                "We put this edit into the constraint. " + _first_of(out_features, "equation"),
                First(square * multipliers, W * (a_C - a_0)),
            ),
            Step(
                "multipliers",
                "Multipliers",
                f"Here we divide by ${latex(squared_norm(problem.a_0))}$. SymPy proves that this sum of squares is "
                f"positive whenever some entry of ${latex(problem.a_0)}$ is not zero.",
                Asked(problem.multipliers, problem.W * (problem.a_C - problem.a_0) / squared_norm(problem.a_0)),
            ),
            Step(
                "formula",
                "Formula",
                f"The multipliers go into ${latex(problem.multipliers * problem.a_0.T)}$.",
                Asked(problem.edit, problem.update()),
            ),
        ),
        unknown=problem.edit,
        result=update,
        statement=Asked(problem.edit, problem.update()),
        arguments={"W": W, "a_without": a_0, "a_with": a_C},
        shapes=SHAPES,
        names={
            **symbols,
            problem.lagrangian_name: lagrangian,
            **dict(zip(derivatives, gradient_entries, strict=True)),
        },
        solution=dict(zip(multipliers, found, strict=True)),
        entries=edit,
        beyond=lambda candidate: tuple(Identity(minor, sp.S.Zero) for minor in two_by_two_minors(candidate)),
    )


def two_by_two_minors(of: sp.MatrixBase) -> list[sp.Expr]:
    """Return all 2 × 2 minors; the rank is at most one where all of them are zero.

    >>> two_by_two_minors(sp.Matrix([[1, 2, 3], [2, 4, 7]]))
    [0, 1, 2]
    """
    return [
        of[i, k] * of[j, q] - of[i, q] * of[j, k]
        for i in range(of.rows)
        for j in range(i + 1, of.rows)
        for k in range(of.cols)
        for q in range(k + 1, of.cols)
    ]


def _first_of(count: int, noun: str) -> str:
    """Say, in a sentence, that one line stands for many."""
    return f"This is the only {noun}." if count == 1 else f"This is the first of {count} {noun}s."
