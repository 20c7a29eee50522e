"""A derivation: what is assumed, the steps, what comes out, and the proof of every formula that is displayed.

A formula that a reader sees is not typed. It is an object made of SymPy expressions: the printer writes it, and
:meth:`Derivation.check` proves it.

- :class:`Identity`: both sides are equal, whatever the symbols are, once names are replaced by what they stand for.
- :class:`Asked`: an equation for an unknown. It is true of the solution that was found, and of nothing else.
- :class:`Given`: an assumption that the proofs use, from left to right.
- :class:`Minimise`: what is minimised, half the squared norm of the unknown.
- :class:`Nonzero`: a condition, printed only; it says where the others hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy as sp
from sympy.matrices.exceptions import ShapeError

from icl_lib.symbolic.algebra import Rule, vanishes
from icl_lib.symbolic.compiled import entry_by_entry, whole_matrices
from icl_lib.symbolic.layout import rows, stacked
from icl_lib.symbolic.notation import dimensions, latex, perpendicular_to, squared_norm


class Equation:
    """Expressions that are equal, with an equals sign between each and the next."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    @property
    def rows(self) -> list[str]:
        """The equation as the printer writes it, in as many rows as a phone needs."""
        return rows(self.parts)

    def holds(self, derivation: Derivation) -> bool:
        """Whether all parts are equal under the names and assumptions of the derivation."""
        first, *others = (derivation.meaning_of(part, self.values(derivation)) for part in self.parts)
        return all(_equal(first, other, derivation.rules) for other in others)

    def values(self, derivation: Derivation) -> Mapping[Any, Any]:
        """What is known of the symbols when the equation is proved."""
        raise NotImplementedError


@lru_cache(maxsize=4096)  # a derivation that differs in one formula proves only this one anew
def _equal(first: Any, other: Any, rules: tuple[Rule, ...]) -> bool:
    return vanishes(other - first, rules)


class Identity(Equation):
    """An equation that holds for all values of its symbols; names stand for what they name."""

    def values(self, derivation: Derivation) -> Mapping[Any, Any]:
        if derivation.entries is None:
            return derivation.names
        return {**derivation.names, derivation.unknown: derivation.entries}


class Asked(Equation):
    """An equation that is asked of an unknown: its solution is put in, and then it must hold."""

    def values(self, derivation: Derivation) -> Mapping[Any, Any]:
        return {**derivation.names, **derivation.solution, **derivation.found}


class First(Asked):
    """Equations for every entry of two matrices, of which the first is displayed and all are proved."""

    @property
    def rows(self) -> list[str]:
        return Asked(*(part[0] for part in self.parts)).rows


class Given(Equation):
    """An assumption that the proofs use: where the left side occurs, the right side may take its place."""

    def holds(self, derivation: Derivation) -> bool:
        return True


class Nonzero:
    """A condition: these are not zero."""

    def __init__(self, *of: Any) -> None:
        self.of = of

    @property
    def rows(self) -> list[str]:
        zero = r"\boldsymbol{0}" if getattr(self.of[0], "is_Matrix", False) else "0"
        symbols = r",\; ".join(map(latex, self.of))
        return [rf"{symbols} \neq {zero}"]

    def holds(self, derivation: Derivation) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class Minimise:
    """What is to be as small as possible: half the squared norm of the unknown, which is what the proofs minimise."""

    objective: Any

    @property
    def rows(self) -> list[str]:
        return [rf"\text{{minimise}}\quad {latex(self.objective)}"]

    def holds(self, derivation: Derivation) -> bool:
        return vanishes(self.objective - squared_norm(derivation.unknown) / 2)


class Step:
    """One assumption or one step: what it says, in Markdown, behind a title in bold, and the formulas it shows."""

    def __init__(self, text: str, *shows: Any) -> None:
        self.text, self.shows = text, shows

    @property
    def latex(self) -> str:
        """The formulas of the step, one below the other."""
        return stacked(row for shown in self.shows for row in shown.rows)

    def markdown(self, number: int | None = None) -> str:
        """Return the step in Markdown, with a number in front of its title."""
        text = self.text if number is None else self.text.replace("**", f"**{number}. ", 1)
        return f"{text}\n\n$$\n{self.latex}\n$$\n"


@dataclass(frozen=True, eq=False)
class Derivation:
    r"""A statement, derived.

    Attributes:
        name: the name of the statement, which its file, its function in the library, its test and its label in the book
            bear as well.
        source: the paper, its version and the number that the statement has there.
        assumptions: what the statement rests on, each under a key, by which code finds it, whatever its text is.
        steps: what follows from the assumptions, in order, under keys as well.
        unknown: the symbol that is derived.
        result: what came out for it, a SymPy expression in the symbols of the arguments.
        arguments: the symbols in the result, by the name of the argument that gives their values. A tuple of symbols
            takes an array with one more dimension in front.
        statement: the result as the book displays it; without one, the equation of the unknown and the result.
        shapes: the dimensions of the array for each argument, and of the one that is returned, by name; without them,
            those of the symbols and of the result.
        names: symbols that stand for an expression.
        solution: the other unknowns of the assumptions, with what was found for them.
        entries: the symbols of the entries of the unknown, where it is derived entry by entry.
        beyond: takes a candidate for the result to further equations that must hold of it and are not displayed.

    >>> from icl_lib.symbolic import bias_update
    >>> derivation = bias_update()
    >>> list(derivation.steps)
    ['reads', 'left_over', 'solve']
    >>> derivation.check()
    True
    """

    name: str
    source: str
    assumptions: Mapping[str, Step]
    steps: Mapping[str, Step]
    unknown: Any
    result: Any
    arguments: Mapping[str, Any]
    statement: Equation | None = None
    shapes: Mapping[str, str] | None = None
    names: Mapping[Any, Any] = field(default_factory=dict)
    solution: Mapping[Any, Any] = field(default_factory=dict)
    entries: sp.MatrixBase | None = None
    beyond: Callable[[Any], tuple[Equation, ...]] = lambda candidate: ()

    def __post_init__(self) -> None:
        shapes = {name: dimensions(symbols) for name, symbols in (*self.arguments.items(), ("return", self.result))}
        object.__setattr__(self, "statement", self.statement or Asked(self.unknown, self.result))
        object.__setattr__(self, "shapes", self.shapes or shapes)

    def step(self, key: str) -> Step:
        """Return the assumption or step with this key; raise `ValueError` if there is none."""
        found = {**self.assumptions, **self.steps}
        if key not in found:
            raise ValueError(f"key is {key!r}, but {self.name} has no such step: choose from {', '.join(found)}.")
        return found[key]

    @property
    def found(self) -> dict[Any, Any]:
        """The unknown, and its entries if it has been derived by them, with the result in their place."""
        by_entry = {} if self.entries is None else dict(zip(self.entries, self.result, strict=True))
        return {self.unknown: self.result, **by_entry}

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The assumptions that proofs use, as rules."""
        given = [shown for step in self.assumptions.values() for shown in step.shows if isinstance(shown, Given)]
        return tuple(Rule(*equation.parts) for equation in given)

    def meaning_of(self, expression: Any, values: Mapping[Any, Any]) -> Any:
        """Put what symbols stand for in their place, until none is left."""
        for _ in range(20):
            found = {symbol: value for symbol, value in values.items() if expression.has(symbol)}
            if not found:
                return expression if self.entries is None else _entries_of(expression.doit())
            expression = expression.xreplace(found)
        raise ArithmeticError(f"the names of {self.name} stand for each other")

    def displayed(self) -> Iterator[tuple[str, Any]]:
        """Yield every formula that is displayed, with the key of its step."""
        for key, step in (*self.assumptions.items(), *self.steps.items()):
            yield from ((key, shown) for shown in step.shows)
        yield "statement", self.statement

    def faults(self) -> list[str]:
        """Return the keys of the steps with a formula that cannot be proved, 'result' if the result is not one.

        The formulas are proved, not sampled. A result of another shape does not fit the assumptions, and fails as well.
        """
        further = (("result", equation) for equation in self.beyond(self.result))
        return [key for key, shown in (*self.displayed(), *further) if not self._holds(shown)]

    def check(self) -> bool:
        """Prove every formula that is displayed, with the result in the place of the unknown."""
        return not self.faults()

    def _holds(self, shown: Any) -> bool:
        try:
            return shown.holds(self)
        except (ShapeError, ValueError, TypeError, ArithmeticError):
            return False

    def lambdify(self, backend: str = "numpy") -> Callable[..., Any]:
        """Return the result as a function of arrays (``backend="numpy"``) or of tensors (``"torch"``).

        It takes one array for each of the `arguments`, in their order, without batch dimensions; a vector is a
        one-dimensional array. It computes in the dtype of what it is given, with PyTorch on its device, and PyTorch
        can differentiate it.

        Raises `ValueError` for another backend; a function derived for a fixed size raises it for another shape.

        >>> import numpy as np
        >>> from icl_lib.symbolic import weight_update
        >>> f = weight_update().lambdify()
        >>> f(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
        array([[1., 1.],
               [0., 0.]])
        """
        signature = ", ".join(f"{name} [{self.shapes[name]}]" for name in self.arguments)
        if self.entries is None:
            compute = whole_matrices(self.result, self.arguments, backend)
        else:
            compute = entry_by_entry(self.result, self.arguments, self.shapes, backend)

        def function(*arrays: Any) -> Any:
            if len(arrays) != len(self.arguments):
                raise TypeError(f"{self.name} takes {signature}; got {len(arrays)} arrays")
            return compute(*arrays)

        function.__name__ = self.name
        function.__doc__ = f"{self.name}({signature}) -> [{self.shapes['return']}], as SymPy derives it."
        return function

    def _repr_markdown_(self) -> str:
        """Return the derivation as Markdown, for a notebook or a page."""
        parts = [f"*{self.source}*\n", "**Assumptions**\n"]
        parts += [assumption.markdown() for assumption in self.assumptions.values()]
        parts += ["**Derivation**\n"]
        parts += [step.markdown(number) for number, step in enumerate(self.steps.values(), start=1)]
        parts += [f"**Result**\n\n$$\n{stacked(self.statement.rows)}\n$$\n"]
        return "\n".join(parts)


def _entries_of(expression: Any) -> Any:
    if isinstance(expression, sp.MatrixExpr):
        return expression.as_explicit()
    return expression.as_immutable() if isinstance(expression, sp.MatrixBase) else expression


def rewritten(derived: Any, simpler: Any, rules: tuple[Rule, ...] = ()) -> Any:
    """Return `simpler`, once it is proved equal to what was derived.

    Solvers return correct but shapeless formulas. This is the only way in which a derivation tidies one up: if the two
    differ, it raises `ArithmeticError`.
    """
    if not vanishes(derived - simpler, rules):
        raise ArithmeticError(f"{derived} was derived, and {simpler} is something else")
    return simpler


def total(sign: str, term: Any, instances: tuple[Mapping[Any, Any], ...]) -> tuple[Any, Any]:
    r"""Return the symbol of a sum, printed from its term, and what it stands for: the terms of a few instances, added.

    The sign, such as ``\sum_h``, is typed; the term is printed, and the instances decide what is proved.
    """
    terms = [term.xreplace(dict(instance)) for instance in instances]
    printed = latex(term)
    name = rf"{sign} {f'({printed})' if isinstance(term, sp.MatAdd | sp.Add) else printed}"
    if not getattr(term, "is_Matrix", False):
        return sp.Symbol(name, real=True), sp.Add(*terms)
    return sp.MatrixSymbol(name, *term.shape), sp.MatAdd(*terms)


def is_least(edit: Any, reads: Any) -> Identity:
    """Every row of an edit of least norm is a multiple of what is read: the edit vanishes on what is perpendicular."""
    return Identity(edit * perpendicular_to(reads), sp.ZeroMatrix(*edit.shape))
