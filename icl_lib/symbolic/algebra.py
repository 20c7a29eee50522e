r"""Expressions of whole matrices, multiplied out: the normal form in which two of them are compared.

A matrix expression is a sum of products. ``multiplied_out`` writes it as such: each product is a *word* of factors
with a number in front. A part of a word that is a row times … times a column is a number and moves to the front as a
trace. Two expressions are equal when their words and numbers are. Sizes may be symbols, so this proves a statement for
all sizes at once.

A :class:`Rule` adds what is assumed: wherever its left side occurs in a word, the right side takes its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import sympy as sp
from sympy.core.symbol import Str
from sympy.matrices.expressions.matexpr import MatrixExpr

Word = tuple[MatrixExpr, ...]


class Applied(MatrixExpr):
    r"""A function of matrices about which nothing is assumed but that equal arguments give equal values.

    >>> f = sp.MatrixSymbol("f", 3, 1)
    >>> Applied(r"\sigma", f.shape, f)
    \sigma(f)
    """

    def __new__(cls, name: str | Str, shape: Iterable[Any], *arguments: MatrixExpr) -> Applied:
        return super().__new__(cls, Str(str(name)), sp.Tuple(*shape), *arguments)

    @property
    def name(self) -> str:
        return str(self.args[0])

    @property
    def arguments(self) -> tuple[MatrixExpr, ...]:
        return self.args[2:]

    @property
    def shape(self) -> tuple[sp.Expr, sp.Expr]:
        return tuple(self.args[1])

    def _sympystr(self, printer: Any) -> str:
        return f"{self.name}({', '.join(printer._print(argument) for argument in self.arguments)})"


class Rule(NamedTuple):
    """An equality that is assumed, read from left to right: a product may be replaced by an expression."""

    left: Any
    right: Any


def multiplied_out(expression: Any, rules: Sequence[Rule] = ()) -> dict[Word, sp.Expr]:
    """Return the words of a matrix expression with the numbers in front of them; a number is one empty word.

    >>> A, b = sp.MatrixSymbol("A", 2, 2), sp.MatrixSymbol("b", 2, 1)
    >>> multiplied_out(A * (b + 2 * b))
    {(A, b): 3}
    """
    if not getattr(expression, "is_Matrix", False):
        return {(): _number(sp.sympify(expression), _words_of(tuple(rules)))}
    words = _words_of(tuple(rules))
    return _collected(_reduced(_terms(expression, words), words))


def vanishes(expression: Any, rules: Sequence[Rule] = ()) -> bool:
    r"""Is this number, matrix of entries or expression of whole matrices identically zero?

    Numbers are compared as rational functions of symbols, exponentials and traces, each trace standing for itself.

    >>> u, v = (sp.MatrixSymbol(name, 3, 1) for name in "uv")
    >>> vanishes(u * v.T * u - sp.Trace(v.T * u) * u), vanishes(u * v.T - v * u.T)
    (True, False)
    """
    if isinstance(expression, sp.MatrixBase):
        return all(_is_zero(entry) for entry in expression)
    return all(map(_is_zero, multiplied_out(expression, rules).values()))


def as_expression(words: Mapping[Word, sp.Expr], shape: tuple[Any, Any]) -> MatrixExpr:
    """Return the sum of the words, in an order of its own."""
    if not words:
        return sp.ZeroMatrix(*shape)
    products = [_product(number, word or (sp.Identity(shape[0]),)) for word, number in words.items()]
    return products[0] if len(products) == 1 else sp.MatAdd(*sorted(products, key=str))


def _product(number: sp.Expr, word: Word) -> MatrixExpr:
    return word[0] if number == 1 and len(word) == 1 else sp.MatMul(*(() if number == 1 else (number,)), *word)


def expanded(expression: Any, rules: Sequence[Rule] = ()) -> Any:
    """Multiply out an expression of whole matrices, or a number that contains some."""
    words = multiplied_out(expression, rules)
    if not getattr(expression, "is_Matrix", False):
        return sp.expand(words.get((), sp.S.Zero))
    return as_expression(words, expression.shape)


def solved(expression: Any, unknown: Any, rules: Sequence[Rule] = ()) -> Any:
    """Solve $k X + B = 0$ for a matrix $X$, with the number $k$ and the matrix $B$ as they are found.

    Raises `ArithmeticError` for an expression that is not of this form.

    >>> X, B = sp.MatrixSymbol("X", 2, 2), sp.MatrixSymbol("B", 2, 2)
    >>> solved(2 * X - B, X)
    (1/2)*B
    """
    words = multiplied_out(expression, rules)
    factor = words.pop((unknown,), sp.S.Zero)
    rest = as_expression(words, unknown.shape)
    if _is_zero(factor) or rest.has(unknown) or factor.has(unknown):
        raise ArithmeticError(f"{expression} is not a number times {unknown} plus a constant")
    return sp.MatMul(-1 / factor, rest).doit(deep=False) if words else rest


def gradient(of: sp.Expr, by: sp.MatrixSymbol) -> MatrixExpr:
    r"""Return $\nabla f$, defined by $f(X + t N) = f(X) + t \operatorname{tr}(\nabla f^\top N) + \dots$ for any $N$.

    >>> X, A = sp.MatrixSymbol("X", 2, 2), sp.MatrixSymbol("A", 2, 2)
    >>> gradient(sp.Trace(X.T * X) / 2 + sp.Trace(A.T * X), X)
    A + X
    """
    step, direction = sp.Dummy("t"), sp.MatrixSymbol("N!", *by.shape)
    along = sp.expand(multiplied_out(of.xreplace({by: by + step * direction}))[()])
    slope = sp.expand(along.diff(step).subs(step, 0))
    words: dict[Word, sp.Expr] = {}
    for trace in slope.atoms(sp.Trace):
        if trace.has(direction):
            word = _transposed_word(_turned_to_end(_factors(trace.arg), direction))
            words[word] = words.get(word, 0) + slope.coeff(trace)
    return as_expression(words, by.shape)


def after(expression: MatrixExpr, first: MatrixExpr) -> MatrixExpr:
    """Return what a factor multiplies from the left, in the terms that begin with it.

    >>> A, x, y = (sp.MatrixSymbol(name, 2, 2) for name in "Axy")
    >>> after(A * x + y, A)
    x
    """
    words = {word[1:]: number for word, number in multiplied_out(expression).items() if word[:1] == (first,)}
    return as_expression(words, (first.shape[1], expression.shape[1]))


def _terms(expression: Any, rules: _Rules) -> Iterator[tuple[sp.Expr, Word]]:
    """Yield numbers and words whose sum is the expression."""
    if isinstance(expression, sp.ZeroMatrix):
        return
    if isinstance(expression, sp.Identity):
        yield sp.S.One, ()
    elif isinstance(expression, sp.MatAdd):
        for term in expression.args:
            yield from _terms(term, rules)
    elif isinstance(expression, sp.MatMul):
        yield from _products(expression.args, rules)
    elif isinstance(expression, sp.Transpose):
        for number, word in _terms(expression.arg, rules):
            yield number, _transposed_word(word)
    elif isinstance(expression, sp.MatPow):  # an inverse is one as well
        once = sp.Inverse(expression.base) if expression.exp < 0 else expression.base
        repeated = [once] * abs(int(expression.exp))
        yield from _inverse(expression.base, rules) if expression.exp == -1 else _products(repeated, rules)
    elif isinstance(expression, Applied):
        arguments = (
            as_expression(_collected(_reduced(_terms(a, rules), rules)), a.shape) for a in expression.arguments
        )
        yield sp.S.One, (Applied(expression.name, expression.shape, *arguments),)
    elif isinstance(expression, sp.MatrixSymbol | sp.DiagMatrix):
        yield sp.S.One, (expression,)
    else:
        raise ArithmeticError(f"{expression} ({type(expression).__name__}) cannot be multiplied out")


def _products(parts: Sequence[Any], rules: _Rules) -> Iterator[tuple[sp.Expr, Word]]:
    if not parts:
        yield sp.S.One, ()
        return
    first, rest = parts[0], parts[1:]
    heads = list(_terms(first, rules)) if getattr(first, "is_Matrix", False) else [(_number(first, rules), ())]
    for number, word in _products(rest, rules):
        for head, start in heads:
            yield head * number, start + word


def _inverse(base: MatrixExpr, rules: _Rules) -> Iterator[tuple[sp.Expr, Word]]:
    words = _collected(_terms(base, rules))
    if base.shape == (1, 1):
        yield 1 / _number(sp.Trace(base), rules), ()
    elif set(words) == {()}:  # a number times the identity
        yield 1 / words[()], ()
    elif len(words) == 1:  # a number times a product
        [(word, number)] = words.items()
        yield 1 / number, (sp.Inverse(_product(sp.S.One, word)),)
    else:
        yield sp.S.One, (sp.Inverse(base),)


def _transposed(factor: MatrixExpr) -> MatrixExpr:
    if isinstance(factor, sp.Transpose):
        return factor.arg
    if isinstance(factor, sp.Inverse):
        words = set(_collected(_terms(factor.arg, ())))
        symmetric = all(_transposed_word(word) == word for word in words)
    else:
        symmetric = isinstance(factor, sp.DiagMatrix)
    return factor if symmetric else sp.Transpose(factor)


def _transposed_word(word: Word) -> Word:
    return tuple(_transposed(factor) for factor in reversed(word))


def _factors(product: MatrixExpr) -> Word:
    """Return the factors of a product without a number in front."""
    [(word, number)] = _collected(_terms(product, _words_of(()))).items()
    if number != 1:
        raise ArithmeticError(f"{product} has a number in front")
    return word


_Rules = tuple[tuple[Word, tuple[tuple[sp.Expr, Word], ...]], ...]


@cache
def _words_of(rules: tuple[Rule, ...]) -> _Rules:
    words = []
    for rule in rules:
        left, right = _factors(rule.left), tuple(_terms(rule.right, ()))
        words.append((left, right))
        if _transposed_word(left) != left:
            words.append((_transposed_word(left), tuple((n, _transposed_word(w)) for n, w in right)))
    return tuple(words)


def _reduced(terms: Iterable[tuple[sp.Expr, Word]], rules: _Rules) -> Iterator[tuple[sp.Expr, Word]]:
    """Apply the rules and cancel inverses until nothing changes, then move numbers to the front."""
    for number, word in terms:
        once = _rewritten(word, rules)
        if once is None:
            yield _numbers_first(number, word, rules)
        else:
            yield from _reduced([(number * n, w) for n, w in once], rules)


def _rewritten(word: Word, rules: _Rules) -> list[tuple[sp.Expr, Word]] | None:
    for at in range(len(word)):
        for left, right in rules:
            if word[at : at + len(left)] == left:
                return [(number, word[:at] + middle + word[at + len(left) :]) for number, middle in right]
        if isinstance(word[at], sp.Inverse):
            cancelled = _cancelled(word, at, _collected(_terms(word[at].arg, rules)))
            if cancelled is not None:
                return cancelled
    return None


def _cancelled(word: Word, at: int, inverted: Mapping[Word, sp.Expr]) -> list[tuple[sp.Expr, Word]] | None:
    r"""Cancel the inverse of $kB + R$ against the product $B$ beside it: $(kB + R)^{-1} B = (I - (kB + R)^{-1} R) / k$.

    Of the words of a sum, $B$ is the longest one, so that the same product is always the one that goes.
    """
    base = max(inverted, key=lambda one: (len(one), str(one)))
    rest = {other: number for other, number in inverted.items() if other != base}
    for start, stop in ((at, at + 1 + len(base)), (at - len(base), at + 1)):
        if start >= 0 and word[start:stop] in ((word[at], *base), (*base, word[at])):
            first = word[start] == word[at]
            left = [(-number, (word[at], *other) if first else (*other, word[at])) for other, number in rest.items()]
            return [
                (number / inverted[base], word[:start] + middle + word[stop:])
                for number, middle in [(sp.S.One, ()), *left]
            ]
    return None


def _numbers_first(number: sp.Expr, word: Word, rules: _Rules) -> tuple[sp.Expr, Word]:
    """Take every row times … times column out of the word."""
    for start in range(len(word)):
        if word[start].shape[0] == 1:
            for stop in range(start, len(word)):
                if word[stop].shape[1] == 1:
                    inner = _named_trace(word[start : stop + 1])
                    return _numbers_first(number * inner, word[:start] + word[stop + 1 :], rules)
    return number, word


def _collected(terms: Iterable[tuple[sp.Expr, Word]]) -> dict[Word, sp.Expr]:
    words: dict[Word, sp.Expr] = {}
    for number, word in terms:
        words[word] = words.get(word, sp.S.Zero) + number
    return {word: number for word, number in words.items() if number != 0}


def _number(expression: sp.Expr, rules: _Rules) -> sp.Expr:
    """Multiply out the matrices in a number."""
    if isinstance(expression, sp.Trace):
        size = expression.arg.shape[0]
        return sp.Add(*(number * _trace(word, size, rules) for number, word in _terms(expression.arg, rules)))
    if not expression.has(sp.Trace):
        return expression
    return expression.func(*(_number(part, rules) for part in expression.args))


def _trace(word: Word, size: sp.Expr, rules: _Rules) -> sp.Expr:
    """Return the trace of a word: its factors may go round, so that a row comes first where there is one."""
    if not word:
        return size
    turns = [word[k:] + word[:k] for k in range(len(word))]
    for turned in turns:
        once = _rewritten(turned, rules)
        if once is not None:
            return sp.Add(*(number * _trace(w, turned[0].shape[0], rules) for number, w in once))
    rows = [turned for turned in turns if turned[0].shape[0] == 1]
    if rows:
        number, left = _numbers_first(sp.S.One, rows[0], rules)
        if left:
            raise ArithmeticError(f"the trace of {rows[0]} does not close")
        return number
    return _named_trace(max((w for turned in turns for w in (turned, _transposed_word(turned))), key=_readability))


def _named_trace(word: Word) -> sp.Expr:
    """Return the trace of a word, which equals that of its transpose; the more readable one stands for both."""
    return sp.Trace(sp.MatMul(*max((word, _transposed_word(word)), key=_readability)))


def _readability(word: Word) -> tuple[int, bool, str]:
    flags = [isinstance(factor, sp.Transpose) for factor in word]
    return -sum(flags), flags[0], str(word)


def _turned_to_end(word: Word, factor: MatrixExpr) -> Word:
    """Return the factors that stand in a trace with one occurrence of a matrix, in front of it."""
    for candidate in (word, _transposed_word(word)):
        if factor in candidate:
            at = candidate.index(factor)
            rest = candidate[at + 1 :] + candidate[:at]
            if not any(part.has(factor) for part in rest):
                return rest
    raise ArithmeticError(f"{word} is not linear in {factor}")


def _is_zero(number: sp.Expr) -> bool:
    """Is a number zero as a rational function of its traces, square roots of them, and symbols?"""
    names: dict[sp.Expr, sp.Expr] = {}
    for trace in number.atoms(sp.Trace):
        word = trace.arg.args if isinstance(trace.arg, sp.MatMul) else (trace.arg,)
        names[trace] = sp.Dummy(positive=True) if _is_square(word) else sp.Dummy(real=True)
    return sp.expand(sp.fraction(sp.together(number.xreplace(names)))[0]) == 0


def _is_square(word: Sequence[MatrixExpr]) -> bool:
    """Is this $A^\\top A$, whose trace is the squared norm of $A$?"""
    half, odd = divmod(len(word), 2)
    return not odd and tuple(word[:half]) == _transposed_word(tuple(word[half:]))
