"""Numbers of operations, and exponents of growth, to compare with measured times."""

from __future__ import annotations

import math
from collections.abc import Sequence


def operations(batch: int, tokens: int, width: int, blocks: int, causal: bool = True) -> dict[str, int]:
    """Return the floating-point operations of the matrix products in one forward pass and in one verification.

    A multiplication and an addition count as two. The verification covers all positions, with reference ``query``. A
    block has attention and an MLP with two hidden layers, four times as wide as the stream.
    """

    def attention(length: int) -> int:  # four projections; scores and weighted values of the attended tokens
        seen = length * (length + 1) // 2 if causal else length * length
        return 4 * length * width**2 + 2 * seen * width

    first, rest = 4 * width**2, (16 + 4) * width**2  # of the MLP, for each token
    forward = attention(tokens) + tokens * (first + rest)
    alone = attention(1) + first + rest
    # In each block: the bare query without edits; with them, attention and W f for the query, and W (g - f) and the
    # rest of the MLP at every position.
    extra = alone + (attention(1) + first) + tokens * (first + rest)
    return {"forward": 2 * batch * blocks * forward, "verify": 2 * batch * blocks * (forward + extra)}


def fitted_exponent(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Return the slope of ``log(value)`` over ``log(size)`` by least squares, and its standard error."""
    x, y = ([math.log(value) for value in series] for series in (sizes, values))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    misfit = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, math.sqrt(misfit / (len(x) - 2) / spread)
