"""A result as a function of arrays: the expression that was derived, compiled for NumPy or PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import reduce
from operator import add, mul
from typing import Any

import sympy as sp

BACKENDS = ("numpy", "torch")


def module_of(backend: str) -> Any:
    """Import a backend by its name."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, which is unknown: use 'numpy' or 'torch'.")
    return importlib.import_module(backend)


def entry_by_entry(
    result: sp.MatrixBase, arguments: Mapping[str, sp.MatrixBase], shapes: Mapping[str, str], backend: str
) -> Callable[..., Any]:
    """Compile a matrix of entries: arithmetic on numbers only, for arrays of one shape."""
    module = module_of(backend)
    expected = {name: _array_shape(symbols, shapes[name]) for name, symbols in arguments.items()}
    symbols = [symbol for argument in arguments.values() for symbol in argument]
    compiled = sp.lambdify(symbols, list(result), modules=module.__name__, cse=True)

    def compute(*arrays: Any) -> Any:
        for (name, shape), array in zip(expected.items(), arrays, strict=True):
            if tuple(array.shape) != shape:
                raise ValueError(
                    f"{name} has shape {tuple(array.shape)}: give [{shapes[name]}] = {shape}, or derive the statement "
                    "without sizes, for all of them."
                )
        numbers = [number for array in arrays for number in array.reshape(-1)]
        return module.stack(compiled(*numbers)).reshape(_array_shape(result, shapes["return"]))

    return compute


def whole_matrices(result: Any, arguments: Mapping[str, Any], backend: str) -> Callable[..., Any]:
    """Compile an expression of matrices whose sizes are symbols: arrays of any fitting sizes."""
    module = module_of(backend)

    def compute(*arrays: Any) -> Any:
        values = {}
        for symbols, array in zip(arguments.values(), arrays, strict=True):
            by_row = isinstance(symbols, tuple)
            for symbol, one in zip(symbols if by_row else (symbols,), array if by_row else (array,), strict=True):
                values[symbol] = one.reshape(-1, 1) if _is_column(symbol) else one
        computed = evaluate(result, values, module)
        return computed.reshape(-1) if _is_column(result) else computed

    return compute


def evaluate(expression: Any, values: Mapping[Any, Any], module: Any) -> Any:
    """Compute an expression of matrices with arrays, two-dimensional, for its symbols.

    >>> import numpy as np
    >>> A, b = sp.MatrixSymbol("A", 2, 2), sp.MatrixSymbol("b", 2, 1)
    >>> evaluate(A * b / sp.Trace(b.T * b), {A: np.eye(2), b: np.array([[2.0], [0.0]])}, np)
    array([[0.5],
           [0. ]])
    """
    like = next((array for symbol, array in values.items() if getattr(symbol, "is_Matrix", False)), None)
    sizes = {
        size: length
        for symbol, array in values.items()
        if getattr(symbol, "is_Matrix", False)
        for size, length in zip(symbol.shape, array.shape, strict=True)
    }

    def value(of: Any) -> Any:
        if of in values:
            return values[of]
        if isinstance(of, sp.Identity):
            kind = {} if module.__name__ == "numpy" else {"device": like.device}
            return module.eye(sizes[of.shape[0]], dtype=like.dtype, **kind)
        if isinstance(of, sp.ZeroMatrix):
            return module.zeros_like(like[:1, :1])  # broadcasts
        if isinstance(of, sp.DiagMatrix):
            return module.diag(value(of.args[0]).reshape(-1))
        if isinstance(of, sp.Transpose):
            return value(of.arg).T
        if isinstance(of, sp.Trace):
            return module.trace(value(of.arg))
        if isinstance(of, sp.MatPow):
            return module.linalg.matrix_power(value(of.base), int(of.exp))
        if isinstance(of, sp.MatMul):
            scalar, factors = of.as_coeff_matrices()
            return value(scalar) * reduce(lambda left, right: left @ right, map(value, factors))
        if isinstance(of, sp.Add | sp.Mul):
            return reduce(add if isinstance(of, sp.Add) else mul, map(value, of.args))
        if isinstance(of, sp.Pow):
            return value(of.base) ** (float(of.exp) if of.exp.is_number else value(of.exp))
        if isinstance(of, sp.exp):
            return module.exp(value(of.args[0]))
        return float(of)

    return value(expression)


def _is_column(of: Any) -> bool:
    return getattr(of, "shape", (1,))[1:] == (1,)


def _array_shape(matrix: sp.MatrixBase, dimensions: str) -> tuple[int, ...]:
    """Return the shape of the array for a matrix, a column or a number."""
    return matrix.shape[: len(dimensions.split())]
