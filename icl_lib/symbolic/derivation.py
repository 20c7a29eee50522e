"""A derivation: what is assumed, the steps SymPy takes, what comes out, and the proof that it is right."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy as sp
from sympy.matrices.exceptions import ShapeError

BACKENDS = ("numpy", "torch")


@dataclass(frozen=True)
class Step:
    """One assumption or one step: the SymPy object, how it is written, and why it holds, in one sentence."""

    name: str
    expression: Any
    latex: str
    why: str

    def markdown(self, number: int | None = None) -> str:
        """Return the step as a bold name, the sentence and the formula."""
        heading = self.name if number is None else f"{number}. {self.name}"
        return f"**{heading}.** {self.why}\n\n$$\n{self.latex}\n$$\n"


@dataclass(frozen=True, eq=False)
class Derivation:
    r"""A statement, derived.

    Attributes:
        name: the name of the statement: the function of the library that computes it bears the same one.
        source: the paper and the number it has there.
        assumptions: what the statement rests on.
        steps: what SymPy did with the assumptions, in order.
        result: what came out, a SymPy object.
        latex: the result as one writes it.
        arguments: the symbols in the result, by the name of the argument that gives their values.
        shapes: the dimensions of the array for each argument, and of the one that is returned, by name.
        must_vanish: takes a candidate for the result to expressions, by name, that are all zero if and only if the
            candidate is what the assumptions ask for.

    >>> from icl_lib.symbolic import bias_update
    >>> derivation = bias_update(2, 2)
    >>> [step.name for step in derivation.steps]
    ['What g reads', 'What is left', 'Bias update']
    >>> derivation.check()
    True
    """

    name: str
    source: str
    assumptions: tuple[Step, ...]
    steps: tuple[Step, ...]
    result: Any
    latex: str
    arguments: Mapping[str, Any]
    shapes: Mapping[str, str]
    must_vanish: Callable[[Any], Mapping[str, Any]]

    def step(self, name: str) -> Step:
        """Return the assumption or step of this name; raise `ValueError` if there is none."""
        named = {step.name: step for step in (*self.assumptions, *self.steps)}
        if name not in named:
            raise ValueError(f"name={name!r} is no step of {self.name}: choose from {', '.join(named)}")
        return named[name]

    def check(self) -> bool:
        """Put the result back into the assumptions: is everything that must vanish zero, identically?

        The answer is a proof, not a sample: the residuals are expanded symbolically. A result of another shape does
        not fit the assumptions, so it fails as well.
        """
        try:
            return all(vanishes(residual) for residual in self.must_vanish(self.result).values())
        except ShapeError:
            return False

    def lambdify(self, backend: str = "numpy") -> Callable[..., Any]:
        """Return the result as a function of arrays (``backend="numpy"``) or of tensors (``"torch"``).

        It takes one array for each of the `arguments`, in their order, without batch dimensions; a vector is a
        one-dimensional array. It computes in the dtype of what it is given, with PyTorch on its device, and PyTorch
        can differentiate it.

        Raises `ValueError` for another backend; a function derived for a fixed size raises it for another shape.

        >>> import numpy as np
        >>> from icl_lib.symbolic import weight_update
        >>> f = weight_update(2, 2).lambdify()
        >>> f(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
        array([[1., 1.],
               [0., 0.]])
        """
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r} is unknown: use 'numpy' or 'torch'")
        module = importlib.import_module(backend)
        compute = _whole_matrices(self, module) if is_whole(self.result) else _entry_by_entry(self, module)
        signature = ", ".join(f"{name} [{self.shapes[name]}]" for name in self.arguments)

        def function(*arrays: Any) -> Any:
            if len(arrays) != len(self.arguments):
                raise TypeError(f"{self.name} takes {signature}; got {len(arrays)} arrays")
            return compute(*arrays)

        function.__name__ = self.name
        function.__doc__ = f"{self.name}({signature}) -> [{self.shapes['return']}], as SymPy derives it."
        return function

    def _repr_markdown_(self) -> str:
        """Return the derivation as Markdown, for a notebook or a page."""
        parts = [f"*{self.source}*\n", "**We assume**\n"]
        parts += [assumption.markdown() for assumption in self.assumptions]
        parts += ["**SymPy derives**\n"]
        parts += [step.markdown(number) for number, step in enumerate(self.steps, start=1)]
        parts += [f"**Result**\n\n$$\n{self.latex}\n$$\n"]
        return "\n".join(parts)


def vanishes(expression: Any) -> bool:
    """Is this scalar or matrix identically zero?

    For entries that are rational functions (of symbols, exponentials, applied functions …) this decides: such a
    function is zero exactly when its expanded numerator is. Expressions of whole matrices are multiplied out.

    >>> a, b = sp.symbols("a b")
    >>> vanishes((a + b) ** 2 - a**2 - 2 * a * b - b**2), vanishes(a / b - b / a)
    (True, False)
    """
    if is_whole(expression):
        return bool(expanded(expression).is_ZeroMatrix)
    entries = list(expression) if isinstance(expression, sp.MatrixBase) else [expression]
    return all(sp.expand(sp.fraction(sp.together(entry))[0]) == 0 for entry in entries)


def is_whole(expression: Any) -> bool:
    """Is this an expression of whole matrices, such as $W X$, rather than a matrix of entries?"""
    return isinstance(expression, sp.MatrixExpr) and not isinstance(expression, sp.MatrixBase)


def expanded(expression: sp.MatrixExpr) -> sp.MatrixExpr:
    """Multiply out an expression of whole matrices."""
    return expression.doit().expand().doit()


def rewritten(derived: Any, simpler: Any) -> Any:
    """Return `simpler`, once SymPy has proved it equal to what was derived.

    Solvers return correct but shapeless formulas. This is the only way in which a derivation tidies one up: if the two
    differ, it raises `ArithmeticError`.
    """
    if not vanishes(derived - simpler):
        raise ArithmeticError(f"{derived} was derived, and {simpler} is something else")
    return simpler


def _entry_by_entry(derivation: Derivation, module: Any) -> Callable[..., Any]:
    """Compile entries of a fixed size: arithmetic on numbers only, whatever the backend."""
    shapes = {name: _array_shape(derivation, name, symbols) for name, symbols in derivation.arguments.items()}
    symbols = [symbol for argument in derivation.arguments.values() for symbol in argument]
    result = derivation.result if derivation.shapes["return"] else sp.ImmutableMatrix([derivation.result])
    shape = _array_shape(derivation, "return", result)
    entries = sp.lambdify(symbols, list(result), modules=module.__name__, cse=True)

    def compute(*arrays: Any) -> Any:
        for (name, expected), array in zip(shapes.items(), arrays, strict=True):
            if tuple(array.shape) != expected:
                raise ValueError(
                    f"{name} has shape {tuple(array.shape)}: give [{derivation.shapes[name]}] = {expected}, "
                    "or derive the statement for other sizes"
                )
        numbers = [number for array in arrays for number in array.reshape(-1)]
        return module.stack(entries(*numbers)).reshape(shape)

    return compute


def _whole_matrices(derivation: Derivation, module: Any) -> Callable[..., Any]:
    """Compile an expression of matrices whose sizes are symbols: any sizes when it is called."""
    symbols = {
        symbol: sp.MatrixSymbol(name, *symbol.shape) if derivation.shapes[name] else sp.Symbol(name)
        for name, symbol in derivation.arguments.items()
    }
    # SymPy has no name for a trace in NumPy.
    modules = [{"Trace": module.trace}, module.__name__]
    product = sp.lambdify(list(symbols.values()), derivation.result.xreplace(symbols), modules=modules)
    vectors = [len(derivation.shapes[name].split()) == 1 for name in derivation.arguments]
    returns_vector = len(derivation.shapes["return"].split()) == 1

    def compute(*arrays: Any) -> Any:
        columns = (
            array.reshape(-1, 1) if is_vector else array for array, is_vector in zip(arrays, vectors, strict=True)
        )
        computed = product(*columns)
        return computed.reshape(-1) if returns_vector else computed

    return compute


def _array_shape(derivation: Derivation, name: str, matrix: sp.MatrixBase) -> tuple[int, ...]:
    """Return the shape of the array for a matrix, a column or a number."""
    return matrix.shape[: len(derivation.shapes[name].split())]
