r"""The symbols of the derivations, and the printer that writes their expressions in LaTeX."""

from __future__ import annotations

import re
from typing import Any

import sympy as sp
from sympy.printing.latex import LatexPrinter

OUT, IN, WIDTH, HEAD, QUERIES, SAMPLE = sp.symbols("m n d h q k", integer=True, positive=True)
"""The sizes of $W$ and of what it reads and outputs are symbols: a proof with them holds for every size."""

SIZES = {OUT: "out", IN: "in", WIDTH: "dim", HEAD: "head", QUERIES: "queries", SAMPLE: "sample"}
"""What the dimensions of arrays are called."""

LAST = ("b", "b'", r"\Delta b'", r"\Delta b'_i", r"\Delta h", r"\Delta\boldsymbol{\gamma}", "N")
"""What is written at the end of a sum: biases, and an edit that is added to others."""

FIRST = (r"\boldsymbol{x}", r"\boldsymbol{c}_{i}", *(rf"\boldsymbol{{h}}_{{{k}}}" for k in "0iC"), "I")
"""What is written at its beginning: the residual stream."""


def matrix(name: str, rows: Any = OUT, columns: Any = IN) -> sp.MatrixSymbol:
    """Return the symbol of a whole matrix."""
    return sp.MatrixSymbol(name, rows, columns)


def vector(letter: str, size: Any = IN, index: str = "", upper: str = "") -> sp.MatrixSymbol:
    r"""Return the symbol of a column, set bold.

    >>> vector("a", index="0")
    \boldsymbol{a}_{0}
    """
    name = rf"\boldsymbol{{{letter}}}" + (f"_{{{index}}}" if index else "") + (f"^{{{upper}}}" if upper else "")
    return sp.MatrixSymbol(name, size, 1)


def number(name: str) -> sp.Symbol:
    """Return the symbol of a real number."""
    return sp.Symbol(name, real=True)


def dimensions(of: Any) -> str:
    """Return the dimensions of the array for a matrix, a column or a number; a tuple of these is one array of them.

    >>> dimensions(matrix("W")), dimensions(vector("a")), dimensions((vector("a", index="1"), vector("a", index="2")))
    ('out in', 'in', '2 in')
    """
    if isinstance(of, tuple):
        return f"{len(of)} {dimensions(of[0])}".rstrip()
    sizes = of.shape if getattr(of, "is_Matrix", False) else ()
    return " ".join(SIZES.get(size, str(size)) for size in (sizes[:1] if sizes[1:] == (1,) else sizes))


def rank_one(column: Any, row: Any) -> Any:
    r"""Return $u f^\top / \|f\|^2$: as an edit it adds $u$ to what a map returns for $f$.

    >>> print(latex(rank_one(vector("u", OUT), vector("f"))))
    \frac{\boldsymbol{u} \boldsymbol{f}^{\top}}{\|\boldsymbol{f}\|^2}
    """
    return column * row.T / squared_norm(row)


def perpendicular_to(read: Any) -> Any:
    r"""Return $I - f f^\top / \|f\|^2$, which takes from a vector its part along $f$."""
    return sp.Identity(read.shape[0]) - rank_one(read, read)


def squared_norm(of: Any) -> sp.Expr:
    r"""Return $\|\cdot\|^2$ of a column, $\|\cdot\|_F^2$ of a matrix."""
    return sp.Trace(of.T * of)


def dot(left: Any, right: Any) -> sp.Expr:
    r"""Return $\operatorname{tr}(L^\top R)$, for columns their inner product."""
    return sp.Trace(left.T * right)


def checked_sizes(**sizes: Any) -> None:
    """Raise a ValueError unless every size is a positive whole number."""
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, which is not a size: give a whole number of at least 1, such as 3.")


class _Printer(LatexPrinter):
    r"""SymPy's LaTeX, with fractions over norms, $A^\top$ for a transpose, and positive terms first."""

    def _print_MatrixSymbol(self, expr: sp.MatrixSymbol) -> str:
        return expr.name

    def _print_Symbol(self, expr: sp.Symbol) -> str:
        return expr.name

    def _print_Transpose(self, expr: sp.Transpose) -> str:
        base, upper, rest = self._print(expr.arg).rpartition("^{")
        if isinstance(expr.arg, sp.MatrixSymbol) and upper and rest.count("}") == 1:
            return f"{base}^{{{rest.removesuffix('}')}\\top}}"  # the index and the transpose share their place
        return f"{self._atom(expr.arg)}^{{\\top}}"

    def _print_Inverse(self, expr: sp.Inverse) -> str:
        return f"{self._atom(expr.arg)}^{{-1}}"

    def _print_DiagMatrix(self, expr: sp.DiagMatrix) -> str:
        return rf"\operatorname{{diag}}({self._print(expr.args[0])})"

    def _print_ZeroMatrix(self, expr: sp.ZeroMatrix) -> str:
        return r"\boldsymbol{0}" if expr.shape[1] == 1 else "0"

    def _print_Identity(self, expr: sp.Identity) -> str:
        return "I"

    def _print_Applied(self, expr: Any) -> str:
        return rf"{expr.name}({', '.join(map(self._print, expr.arguments))})"

    def _print_Trace(self, expr: sp.Trace) -> str:
        scalar, factors = _split(expr.arg)
        if scalar != 1:
            return self._print(sp.Mul(scalar, sp.Trace(sp.MatMul(*factors)), evaluate=False))
        half, odd = divmod(len(factors), 2)
        if not odd and all(other == one.T for one, other in zip(factors, reversed(factors), strict=True)):
            inside = sp.MatMul(*factors[half:]) if half > 1 else factors[half]
            return rf"\|{self._print(inside)}\|{'' if factors[-1].shape[1] == 1 else '_F'}^2"
        if factors[0].shape[0] == 1:
            return self._print(expr.arg)
        return rf"\operatorname{{tr}}({self._print(expr.arg)})"

    def _print_Pow(self, expr: Any) -> str:
        if isinstance(expr.base, sp.Trace) and expr.exp == sp.S.Half:
            printed = self._print(expr.base)
            if printed.endswith("^2"):
                return printed.removesuffix("^2")
        return super()._print_Pow(expr)

    def _print_Mul(self, expr: Any) -> str:
        if _is_negative(expr) or not (expr.has(sp.Trace) or r"\cos" in str(expr)):
            return super()._print_Mul(expr)
        above, below = sp.fraction(expr)
        # A half in front of a norm is set small.
        half, below = (r"\tfrac{1}{2} ", sp.S.One) if below == 2 else ("", below)
        return half + (
            self._numbers(above) if below == 1 else rf"\frac{{{self._numbers(above)}}}{{{self._numbers(below)}}}"
        )

    def _numbers(self, product: sp.Expr) -> str:
        """Write a product of numbers, inner products in brackets, those of the left factors first."""

        def rank(factor: sp.Expr) -> tuple[bool, bool, int, str]:
            printed = self._print(factor)
            letter = re.search(r"boldsymbol\{(\w)\}", printed)
            return not factor.is_number, factor.has(sp.Trace), 200 - ord(letter[1]) if letter else 0, printed

        factors = sorted(sp.Mul.make_args(product), key=rank)
        return r"\, ".join(self._scalar(f) if len(factors) > 1 else self._print(f) for f in factors)

    def _print_Add(self, expr: Any, order: Any = None) -> str:
        if not expr.has(sp.Trace):
            return super()._print_Add(expr, order)
        return self._print_MatAdd(expr)

    def _print_MatAdd(self, expr: Any) -> str:
        first, *others = self.signed_terms(expr)
        return ("- " if first[0] else "") + first[1] + "".join(f" {'-' if n else '+'} {t}" for n, t in others)

    def signed_terms(self, expr: Any) -> list[tuple[bool, str]]:
        """The terms of a sum as signs (true is minus) and LaTeX: positive and short ones first, biases last."""

        def rank(term: Any) -> tuple[int, bool, bool, int]:
            scalar, factors = _split(term)
            name = _name_of(factors)
            size = len(factors) + (abs(scalar) != 1) + any(isinstance(factor, sp.MatAdd) for factor in factors)
            return 1 + LAST.index(name) if name in LAST else 0, _is_negative(term), name not in FIRST, size

        terms = sorted(expr.args, key=rank)
        return [(_is_negative(term), self._print(-term if _is_negative(term) else term)) for term in terms]

    def _print_MatMul(self, expr: Any) -> str:
        scalar, factors = _split(expr)
        if scalar == 1 and len(factors) == 2 and factors[0].atoms(sp.DiagMatrix):
            return self._entry_by_entry(*factors)
        if _is_negative(expr):
            return "- " + self._print_MatMul(sp.MatMul(-scalar, *factors))
        above, below = sp.fraction(scalar)
        lonely = below == 1 and above == 1 and len(factors) == 1
        product = r" ".join(self._print(f) if lonely else self._factor(f) for f in factors)
        in_front = "" if above == 1 else self._scalar(above)
        if below == 1:
            return rf"{in_front}\, {product}" if in_front else product
        if sp.S(below).is_Integer:
            return rf"\tfrac{{1}}{{{below}}} {in_front} {product}"
        if isinstance(above, sp.Add) or (in_front and len(factors) > 1):
            return rf"\frac{{{self._print(above)}}}{{{self._print(below)}}}\, {product}"
        alone = len(factors) == 1 and not in_front
        in_front = rf"{in_front}\, " if in_front else ""
        return rf"\frac{{{in_front}{self._print(factors[0]) if alone else product}}}{{{self._print(below)}}}"

    def _entry_by_entry(self, diagonal: Any, column: Any) -> str:
        """Write a product with a diagonal matrix as a product, or a quotient, of two columns."""
        if isinstance(diagonal, sp.DiagMatrix):
            return rf"{self._factor(diagonal.args[0])} \odot {self._factor(column)}"
        return rf"{self._factor(column)} \oslash {self._factor(diagonal.arg.args[0])}"

    def _scalar(self, expr: sp.Expr) -> str:
        printed = self._print(expr)
        is_product = isinstance(expr, sp.Trace) and " " in printed and not printed.startswith((r"\operatorname", r"\|"))
        return rf"({printed})" if isinstance(expr, sp.Add) or is_product else printed

    def _factor(self, expr: Any) -> str:
        printed = self._print(expr)
        return _bracketed(printed) if isinstance(expr, sp.MatAdd) or printed.startswith(r"\sum") else printed

    def _atom(self, expr: Any) -> str:
        printed = self._print(expr)
        simple = isinstance(expr, sp.DiagMatrix) or (isinstance(expr, sp.MatrixSymbol) and "^" not in expr.name)
        return printed if simple else _bracketed(printed)


def _bracketed(formula: str) -> str:
    r"""Put brackets around a formula, large ones around fractions."""
    return rf"\Bigl({formula}\Bigr)" if r"\frac" in formula else f"({formula})"


def _split(term: Any) -> tuple[sp.Expr, tuple[Any, ...]]:
    """Split a product into the number in front and the matrices; of a number, into its sign and its other factors."""
    if isinstance(term, sp.MatMul):
        scalar, factors = term.as_coeff_matrices()
        return scalar, tuple(factors)
    if isinstance(term, sp.Mul):
        return (sp.S.NegativeOne, (-term).args or (-term,)) if _is_negative(term) else (sp.S.One, term.args)
    return sp.S.One, (term,)


def _name_of(factors: tuple[Any, ...]) -> str:
    """Return the name of the one matrix a term consists of, or whose norm it is; a bias may be mapped."""
    last = factors[-1]
    if len(factors) == 1 and isinstance(last, sp.Trace) and len(set(last.arg.args) - {last.arg.args[0]}) == 1:
        last = last.arg.args[-1]
    elif len(factors) > 1 and getattr(last, "name", "") != "b":
        return ""
    return getattr(last, "name", str(last))


def _is_negative(term: Any) -> bool:
    number = term.as_coeff_matrices()[0] if isinstance(term, sp.MatMul) else term
    return not isinstance(number, sp.Add | sp.MatrixExpr) and bool(number.could_extract_minus_sign())


_PRINTER = _Printer({"mat_delim": "("})


def signed_terms(expression: Any) -> list[tuple[bool, str]]:
    """Return the terms of a sum as the printer orders them: is it subtracted, and its LaTeX."""
    return _PRINTER.signed_terms(expression)


def latex(expression: Any) -> str:
    """Return the expression in LaTeX, in the book's notation.

    >>> a_0, a_C = vector("a", index="0"), vector("a", index="C")
    >>> print(latex(matrix("W") * (a_C - a_0)))
    W (\\boldsymbol{a}_{C} - \\boldsymbol{a}_{0})
    """
    return _PRINTER.doprint(expression)
