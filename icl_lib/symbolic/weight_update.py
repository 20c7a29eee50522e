r"""The weight update: the edit of least norm that gives the layer the pre-activation that it has with the context."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, First, Identity, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, checked_sizes, dot, latex, matrix, number, rank_one, squared_norm, vector

N = matrix("N")
SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 1, Theorem 2.2; least norm: version 4, Theorem 2.3"


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


class LeastEdit:
    """The least edit with which a map returns what is wanted for what it reads: a constraint, and its Lagrangian."""

    def __init__(self, weight: Any, edit: Any, reads: Any, wanted: Any, multipliers: Any) -> None:
        self.weight, self.edit, self.reads, self.wanted, self.multipliers = weight, edit, reads, wanted, multipliers
        self.value, self.nearby = (number(rf"\mathcal{{L}}({at})") for at in (edit.name, f"{edit.name} + N"))
        self.names = {self.value: self.lagrangian(edit), self.nearby: self.lagrangian(edit + N)}

    def effect(self, edit: Any) -> Any:
        """Return what the constraint asks to be zero."""
        return (self.weight + edit) * self.reads - self.wanted

    def lagrangian(self, edit: Any) -> sp.Expr:
        """Return half the squared norm of an edit, less the multipliers times what the constraint asks to be zero."""
        return squared_norm(edit) / 2 - dot(self.multipliers, self.effect(edit))

    @cached_property
    def outer_product(self) -> Any:
        """The edit at which the gradient of the Lagrangian is zero."""
        stationary = solved(gradient(self.lagrangian(self.edit), self.edit), self.edit)
        return rewritten(stationary, self.multipliers * self.reads.T)

    def solved_for(self, added: Any) -> tuple[Any, Any]:
        """Solve the constraint for the multipliers; return them, and the edit, which adds `added` to the output."""
        found = solved(expanded(self.effect(self.outer_product)), self.multipliers)
        found = rewritten(found, added / squared_norm(self.reads))
        return found, rewritten(self.outer_product.xreplace({self.multipliers: found}), rank_one(added, self.reads))


class Problem(LeastEdit):
    """The problem of the weight update: its symbols, and what both derivations tell about it."""

    def __init__(self, out_features: object = OUT, in_features: object = IN) -> None:
        self.W, edit = (matrix(name, out_features, in_features) for name in ("W", r"\Delta W"))
        self.a_0, self.a_C = (vector("a", in_features, index) for index in "0C")
        multipliers = vector(r"\lambda", out_features)
        super().__init__(self.W, edit, self.a_0, self.W * self.a_C, multipliers)
        self.added = self.W * (self.a_C - self.a_0)

    def assumptions(self) -> dict[str, Step]:
        """Return what both derivations assume."""
        return dict(
            effect=Step(
                f"**Same pre-activation.** The edited layer, given ${latex(self.a_0)}$ (read without the context), "
                f"returns what the original layer returns for ${latex(self.a_C)}$ (read with the context).",
                Asked((self.W + self.edit) * self.a_0, self.W * self.a_C),
            ),
            least_norm=Step(
                "**Least norm.** Many edits do this. We ask for the one that changes the weights least.",
                Minimise(squared_norm(self.edit) / 2),
            ),
            nonzero=Step(
                f"**Nonzero activation.** If ${latex(self.a_0)}$ were zero, every edit would map it to zero.",
                Nonzero(self.a_0),
            ),
        )

    def formula(self) -> Step:
        """Return the last step of both derivations."""
        return Step(
            f"**Formula.** The multipliers go into ${latex(self.multipliers * self.a_0.T)}$.",
            Asked(self.edit, rank_one(self.added, self.a_0)),
        )


@cache
def _of_any_size() -> Derivation:
    problem = Problem()
    edit, a_0, multipliers = problem.edit, problem.a_0, problem.multipliers
    lagrangian, slope = problem.names[problem.value], matrix(r"\nabla\mathcal{L}(\Delta W)")
    found, update = problem.solved_for(problem.added)

    return Derivation(
        name="weight_update",
        source=SOURCE,
        assumptions=problem.assumptions(),
        steps=dict(
            lagrangian=Step(
                f"**Lagrangian.** The multipliers of the constraint form a column, ${latex(multipliers)}$.",
                Identity(problem.value, lagrangian),
            ),
            stationarity=Step(
                "**Stationarity.** At a minimum the gradient with respect to $\\Delta W$ is zero.",
                Identity(slope, edit - multipliers * a_0.T),
                Asked(slope, sp.ZeroMatrix(OUT, IN)),
            ),
            outer_product=Step(
                "**Outer product.** So the edit is a column times a row. **Its rank is at most one**, although no such "
                "form was assumed.",
                Asked(edit, problem.outer_product),
            ),
            constraint=Step(
                "**What remains of the constraint.** We put this edit into the constraint.",
                Asked(squared_norm(a_0) * multipliers, problem.added),
            ),
            multipliers=Step(
                f"**Multipliers.** Here we divide by ${latex(squared_norm(a_0))}$, which is not zero because "
                f"${latex(a_0)}$ is not.",
                Asked(multipliers, found),
            ),
            formula=problem.formula(),
            second_order=Step(
                "**Minimum.** The Lagrangian is quadratic in the edit. At the stationary point, with these "
                "multipliers, its gradient is zero, so adding any $N$ raises it by half the squared norm of $N$. Where "
                "the constraint holds, the Lagrangian is half the squared norm of the edit. So every other edit that "
                "satisfies the constraint is larger.",
                Identity(problem.nearby, problem.value + dot(slope, N) + squared_norm(N) / 2),
                Asked(problem.nearby - problem.value, squared_norm(N) / 2),
            ),
        ),
        unknown=edit,
        result=update,
        arguments={"W": problem.W, "a_without": a_0, "a_with": problem.a_C},
        names={**problem.names, slope: gradient(lagrangian, edit)},
        solution={multipliers: found},
    )


def column(letter: str, size: int, label: str = "") -> sp.ImmutableMatrix:
    """Return a column of real symbols, numbered from 1, for the derivation entry by entry.

    >>> column("a", 2, "0").T
    Matrix([[a_{0,1}, a_{0,2}]])
    """
    prefix = f"{label}," if label else ""
    return sp.ImmutableMatrix(size, 1, lambda i, _: sp.Symbol(f"{letter}_{{{prefix}{i + 1}}}", real=True))


def entries(letter: str, rows: int, columns: int) -> sp.ImmutableMatrix:
    """Return a matrix of real symbols, numbered from 1.

    >>> entries("W", 1, 2)
    Matrix([[W_{1,1}, W_{1,2}]])
    """
    return sp.ImmutableMatrix(rows, columns, lambda i, j: sp.Symbol(f"{letter}_{{{i + 1},{j + 1}}}", real=True))


class Entries:
    """What SymPy finds when it differentiates by every entry of the edit, and solves for each of them."""

    def __init__(self, out_features: int, in_features: int) -> None:
        self.W, self.edit = (entries(name, out_features, in_features) for name in ("W", r"\Delta W"))
        self.a_0, self.a_C = (column("a", in_features, label) for label in "0C")
        self.multipliers = column(r"\lambda", out_features)
        self.square = (self.a_0.T * self.a_0)[0]
        effect = (self.W + self.edit) * self.a_0 - self.W * self.a_C
        self.lagrangian = sum(entry**2 for entry in self.edit) / 2 - (self.multipliers.T * effect)[0]
        self.gradient = self.edit.applyfunc(lambda entry: sp.diff(self.lagrangian, entry))
        stationary = self.edit.xreplace(sp.solve(list(self.gradient), list(self.edit)))
        self.outer_product = rewritten(stationary, self.multipliers * self.a_0.T)

        remaining = effect.xreplace(dict(zip(self.edit, self.outer_product, strict=True))).applyfunc(sp.expand)
        if not all(self.square.xreplace({entry: sp.Dummy(real=True, zero=False)}).is_positive for entry in self.a_0):
            raise ArithmeticError(f"{self.square} may be zero, and SymPy is about to divide by it")
        found = self.multipliers.xreplace(sp.solve(list(remaining), list(self.multipliers)))
        found = rewritten(found, self.W * (self.a_C - self.a_0) / self.square)
        self.solution = dict(zip(self.multipliers, found, strict=True))


@cache
def _entry_by_entry(out_features: int, in_features: int) -> Derivation:
    problem, by_entry = Problem(out_features, in_features), Entries(out_features, in_features)
    W, edit, a_0, a_C = by_entry.W, by_entry.edit, by_entry.a_0, by_entry.a_C
    derivatives = entries(r"\frac{\partial \mathcal{L}}{\partial \Delta W", out_features, in_features)
    derivatives = derivatives.applyfunc(lambda symbol: sp.Symbol(f"{symbol.name}}}", real=True))

    return Derivation(
        name="weight_update",
        source=SOURCE,
        assumptions=problem.assumptions(),
        steps=dict(
            lagrangian=Step(
                "**Lagrangian.** Each row of the constraint gets a multiplier $\\lambda_i$.",
                Identity(problem.value, problem.names[problem.value]),
            ),
            stationarity=Step(
                "**Stationarity.** At a minimum the derivative with respect to every entry is zero. "
                f"{_first_of(len(edit))}",
                First(derivatives, by_entry.gradient, sp.zeros(*edit.shape)),
            ),
            outer_product=Step(
                f"**Outer product.** SymPy solves for the {len(edit)} entries. The solution is a column times a row. "
                "**Its rank is at most one**, although no such form was assumed.",
                First(edit, by_entry.outer_product),
                Asked(problem.edit, problem.multipliers * problem.a_0.T),
            ),
            constraint=Step(
                f"**What remains of the constraint.** We put this edit into the constraint. {_first_of(out_features)}",
                First(by_entry.square * by_entry.multipliers, W * (a_C - a_0)),
            ),
            multipliers=Step(
                f"**Multipliers.** Here we divide by ${latex(squared_norm(problem.a_0))}$. SymPy proves that this sum "
                f"of squares is positive whenever some entry of ${latex(problem.a_0)}$ is not zero.",
                Asked(problem.multipliers, problem.added / squared_norm(problem.a_0)),
            ),
            formula=problem.formula(),
        ),
        unknown=problem.edit,
        result=by_entry.outer_product.xreplace(by_entry.solution),
        statement=problem.formula().shows[0],
        arguments={"W": W, "a_without": a_0, "a_with": a_C},
        shapes=_of_any_size().shapes,
        names={
            **{problem.W: W, problem.a_0: a_0, problem.a_C: a_C, problem.multipliers: by_entry.multipliers},
            problem.value: by_entry.lagrangian,
            **dict(zip(derivatives, by_entry.gradient, strict=True)),
        },
        solution=by_entry.solution,
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


def _first_of(equations: int) -> str:
    """Say that one line stands for many."""
    return "This is the only equation." if equations == 1 else f"This is the first of {equations} equations."
