"""Displayed equations of derivations, evaluated with random arrays: an oracle that knows no algebra."""

import numpy as np
import sympy as sp
from sympy.matrices.expressions.matexpr import MatrixElement

from icl_lib.symbolic.algebra import Applied
from icl_lib.symbolic.compiled import evaluate

SIZES = {"m": 3, "n": 4, "d": 4, "h": 2, "q": 2, "e": 3, "k": 6}


def numerically_true(derivation, equation, rounding=1e-9):
    """Whether all parts of an equation are the same numbers, for random values of the symbols."""
    known = dict(equation.values(derivation))
    parts = [with_sizes(derivation.meaning_of(part, known)) for part in equation.parts]
    values = random_values(parts, [[with_sizes(side) for side in rule] for rule in derivation.rules])
    numbers = [array_of(part, values) for part in parts]
    scale = max(np.abs(number).max() for number in numbers) + 1
    return all(np.abs(number - numbers[0]).max() <= rounding * scale for number in numbers)


def with_sizes(expression):
    """Put numbers in the place of the symbols of sizes, and of an index."""
    sizes = {sp.Symbol(name, integer=True, positive=True): size for name, size in {**SIZES, "i": 1}.items()}
    sized = expression.subs({symbol: size for symbol, size in sizes.items() if expression.has(symbol)})
    return sized.doit() if sized.has(sp.Sum) else sized


def random_values(parts, given):
    """Random arrays for matrices, positive numbers for the others, for which the assumptions of the proofs hold."""
    rng, values = np.random.default_rng(11), {}
    together = [*parts, *(side for rule in given for side in rule)]
    matrices = set().union(*(part.atoms(sp.MatrixSymbol) for part in together))
    numbers = set().union(*(part.free_symbols | part.atoms(sp.Indexed) for part in together)) - matrices
    for symbol in sorted(matrices, key=str):
        values[symbol] = rng.normal(size=[int(size) for size in symbol.shape])
    for symbol in sorted(numbers, key=str):
        values[symbol] = rng.uniform(0.5, 1.5)
    for left, right in given:
        impose(left, right, values)
    return values


def impose(left, right, values):
    """Change the first matrix of a product, so that an assumption of the form X a = b or PᵀP = I holds."""
    if isinstance(right, sp.Identity):
        [P] = left.atoms(sp.MatrixSymbol)
        values[P] = np.eye(len(values[P]))[::-1]
    elif isinstance(left, sp.MatMul):
        matrix, column = left.args
        read = values[column]
        wanted = np.zeros((len(values[matrix]), 1)) + evaluate(right, values, np)
        values[matrix] = values[matrix] + (wanted - values[matrix] @ read) @ read.T / (read.T @ read)


def array_of(expression, values):
    """The expression with arrays for its symbols."""
    if isinstance(expression, sp.MatrixBase):
        numbers = {symbol: value for symbol, value in values.items() if np.ndim(value) == 0}
        elements = {one: values[one.parent][one.i, one.j] for one in expression.atoms(MatrixElement)}
        return np.array([float(entry.xreplace({**numbers, **elements})) for entry in expression])
    if not getattr(expression, "is_Matrix", False) and not expression.atoms(sp.MatrixSymbol):
        return np.array(float(expression.xreplace(values)))
    # One fixed function stands for every function of matrices; of one vector it acts entry by entry.
    for applied in sorted(expression.atoms(Applied), key=lambda one: len(str(one))):
        inside = np.tanh(np.concatenate([array_of(argument, values) for argument in applied.arguments]))
        values[applied] = inside if len(inside) == applied.shape[0] else np.resize(inside[::-1], applied.shape)
    return np.asarray(evaluate(expression, values, np))
