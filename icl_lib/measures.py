r"""How far two results are apart, and how such a number is written in a sentence."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, Context, Decimal

import torch
from torch import Tensor

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
TIMES = "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}"
"""A number such as 7 × 10⁻¹⁶ must not be broken at the end of a line."""


def relative_error(actual: Tensor, expected: Tensor) -> Tensor:
    r"""Return $\lVert a - e \rVert / \lVert e \rVert$ for each vector of the last dimension.

    Shapes: ``[*batch, dim]`` twice; the result is ``[*batch]``. It is 0 where the two agree bit for bit, also where
    both are zero, and infinite where only ``expected`` is zero. Half precision is computed in float32, since its
    squares overflow.

    >>> relative_error(torch.tensor([[3.0, 4.0], [2.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor([0., 1.])
    """
    actual, expected = actual.to(wide(actual)), expected.to(wide(actual))
    distance = torch.linalg.vector_norm(actual - expected, dim=-1)
    return torch.where(distance == 0, distance, distance / torch.linalg.vector_norm(expected, dim=-1))


def wide(tensor: Tensor) -> torch.dtype:
    """Return the precision to compute norms in: float32 for half precision, whose squares overflow."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def scientific(value: float, digits: int = 1) -> str:
    """Write a number with this many significant digits, as it is set in a sentence.

    Powers of ten are used below 0.001 and from 100,000 on. The spaces do not break at the end of a line.

    >>> print(scientific(7.2e-16), scientific(0.0123, 2), scientific(0.0))
    7 × 10⁻¹⁶ 0.012 0
    >>> print(scientific(-1.26e6, 2))
    −1.3 × 10⁶
    """
    if not math.isfinite(value):
        raise ValueError(f"value is {value}: give a finite number.")
    return _written(Context(prec=digits).create_decimal(Decimal(value)))


def at_most(value: float, digits: int = 1) -> str:
    """Write an upper bound: as :func:`scientific`, but rounded up.

    >>> print(at_most(7.2e-16), at_most(0.5))
    8 × 10⁻¹⁶ 0.5
    """
    if not math.isfinite(value):
        raise ValueError(f"value is {value}: give a finite number.")
    return _written(Context(prec=digits, rounding=ROUND_CEILING).create_decimal(Decimal(repr(float(value)))))


def _written(number: Decimal) -> str:
    mantissa, exponent = f"{number:e}".split("e")
    if number == 0:
        return "0"
    if -3 <= int(exponent) < 5:
        return f"{number:f}".replace("-", "−")
    return f"{mantissa}{TIMES}10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", "−")
