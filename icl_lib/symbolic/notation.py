r"""Symbols, as the book writes them: $W$, $\boldsymbol a_0$ without the context, $\boldsymbol a_C$ with it."""

from __future__ import annotations

from typing import Any

import sympy as sp
from sympy.matrices.exceptions import ShapeError
from sympy.printing.latex import LatexPrinter

A_WITHOUT, A_WITH = r"\boldsymbol{a}_0", r"\boldsymbol{a}_C"
MULTIPLIERS, DIFFERENCE = r"\boldsymbol{\lambda}", r"\boldsymbol{\delta}"
SQUARED_NORM = rf"\|{A_WITHOUT}\|^2"


def checked_sizes(**sizes: int) -> None:
    """Raise a ValueError unless every size is a positive whole number."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is no size: give a whole number of at least 1, such as 3")


def matrix(letter: str, rows: int, columns: int) -> sp.ImmutableMatrix:
    """Return a matrix of real symbols, numbered from 1.

    >>> matrix("W", 1, 2)
    Matrix([[W_{1,1}, W_{1,2}]])
    """
    return sp.ImmutableMatrix(rows, columns, lambda i, j: sp.Symbol(f"{letter}_{{{i + 1},{j + 1}}}", real=True))


def vector(letter: str, size: int, label: str = "") -> sp.ImmutableMatrix:
    """Return a column of real symbols, numbered from 1; the label goes in front of the number.

    >>> vector("a", 2, "0").T
    Matrix([[a_{0,1}, a_{0,2}]])
    """
    prefix = f"{label}," if label else ""
    return sp.ImmutableMatrix(size, 1, lambda i, _: sp.Symbol(f"{letter}_{{{prefix}{i + 1}}}", real=True))


def put(expression: Any, *replacements: tuple[sp.MatrixBase, sp.MatrixBase]) -> Any:
    """Put matrices of values in the place of matrices of symbols of the same shape, all at once."""
    for old, new in replacements:
        if old.shape != new.shape:
            raise ShapeError(f"a matrix {new.shape} cannot stand for one that is {old.shape}")
    return expression.xreplace(
        {symbol: value for old, new in replacements for symbol, value in zip(old, new, strict=True)}
    )


def inner(left: sp.MatrixBase, right: sp.MatrixBase) -> sp.Expr:
    r"""Return the Frobenius inner product $\sum_{ij} L_{ij} R_{ij}$."""
    return sp.Add(*(a * b for a, b in zip(left, right, strict=True)))


def squared_norm(of: sp.MatrixBase) -> sp.Expr:
    r"""Return $\|\cdot\|^2$ of a vector, $\|\cdot\|_F^2$ of a matrix."""
    return inner(of, of)


def positive_unless_zero(of: sp.MatrixBase) -> bool:
    """Does SymPy prove the squared norm positive as soon as any one of these real entries is not zero?"""
    return all(squared_norm(of).xreplace({entry: sp.Dummy(real=True, zero=False)}).is_positive for entry in of)


def first_of(count: int, noun: str, plural: str = "") -> str:
    """Say, in a sentence, that one line stands for many."""
    return f"This is the only {noun}." if count == 1 else f"Here is the first of {count} {plural or noun + 's'}."


class _Printer(LatexPrinter):
    r"""SymPy's LaTeX, with $A^\top$ for a transpose and $\|A\|^2$ for $\operatorname{tr}(A^\top A)$."""

    def _print_Transpose(self, expr: sp.Transpose) -> str:
        return f"{self.parenthesize(expr.arg, 100)}^{{\\top}}"

    def _print_Trace(self, expr: sp.Trace) -> str:
        factors = expr.arg.args
        if len(factors) == 2 and factors[0] == factors[1].T:
            subscript = "" if factors[1].shape[1] == 1 else "_F"
            return rf"\|{self._print(factors[1])}\|{subscript}^2"
        return rf"\operatorname{{tr}}({self._print(expr.arg)})"


def latex(expression: Any) -> str:
    """Return the expression in LaTeX, in the book's notation."""
    return _Printer({"mat_delim": "("}).doprint(expression)


def stacked(*lines: str) -> str:
    """Set formulas one below the other, so that they fit a narrow screen."""
    return "\\begin{gathered}\n" + " \\\\[0.5em]\n".join(lines) + "\n\\end{gathered}"


def over_squared_norm(expression: sp.Expr, a_without: sp.MatrixBase) -> str:
    r"""Write an entry as its numerator over $\|a_0\|^2$, which SymPy has to find in it."""
    numerator = sp.cancel(expression * squared_norm(a_without))
    return rf"\frac{{{latex(numerator)}}}{{{SQUARED_NORM}}}"
