r"""Layer norm, written out, through which the MLP of a pre-LN block reads its residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import checked_sizes, first_of, latex, put, squared_norm, stacked, vector

NORMALISED = r"\frac{x_k - m}{\sqrt{v + \varepsilon}}"
LAYER_NORM = rf"\operatorname{{LN}}(x)_k = \gamma_k {NORMALISED} + \beta_k"


@lru_cache(maxsize=None, typed=True)
def layer_norm(dim: int) -> Derivation:
    r"""Derive what layer norm does to the mean and the variance of a vector.

    $$\operatorname{LN}(x) = \gamma \odot \frac{x - m}{\sqrt{v + \varepsilon}} + \beta, \qquad
    m = \tfrac1d \sum_k x_k, \quad v = \tfrac1d \sum_k (x_k - m)^2$$

    Before the scale $\gamma$ and the shift $\beta$ the mean is zero and the variance $v / (v + \varepsilon)$. Every
    entry of the result depends on every entry of $x$.

    Source: Ba, Kiros, Hinton 2016 (arXiv 1607.06450), section 3; $\varepsilon \ge 0$ as in PyTorch.

    Shapes: the result is a function of ``x`` ``[dim]``, ``gain`` $\gamma$ ``[dim]``, ``shift`` $\beta$ ``[dim]`` and
    ``eps`` $\varepsilon$, an array or tensor without dimensions.

    Raises `ValueError` for a size that is not a whole number of at least 1. With $v + \varepsilon = 0$, which is a
    constant vector and no $\varepsilon$, layer norm is not defined.

    >>> import numpy as np
    >>> derivation = layer_norm(2)
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([3.0, 5.0]), np.ones(2), np.array([0.0, 7.0]), np.array(0.0))
    array([-1.,  8.])
    """
    checked_sizes(dim=dim)
    x, gain, shift = vector("x", dim), vector(r"\gamma", dim), vector(r"\beta", dim)
    eps, constant = sp.Symbol(r"\varepsilon", nonnegative=True), sp.Symbol("c", real=True)
    ones, zeros = sp.ones(dim, 1), sp.zeros(dim, 1)

    def mean(of: sp.MatrixBase) -> sp.Expr:
        return sp.Add(*of) / dim

    centred = x - mean(x) * ones
    variance = squared_norm(centred) / dim
    normalised = centred / sp.sqrt(variance + eps)
    result = sp.ImmutableMatrix(gain.multiply_elementwise(normalised) + shift)

    left = rewritten(squared_norm(normalised) / dim, variance / (variance + eps))
    # A constant vector has no variance, so here ε must be positive for the division.
    flat = put(result, (x, constant * ones)).xreplace({eps: sp.Dummy(positive=True)})

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        plain = put(candidate, (gain, ones), (shift, zeros))
        return {
            "definition": candidate - gain.multiply_elementwise(normalised) - shift,
            "mean": mean(plain),
            "variance": squared_norm(plain) / dim - left,
            "constant vector": put(candidate, (x, constant * ones)) - shift,
        }

    return Derivation(
        name="layer_norm",
        source="Ba, Kiros, Hinton 2016 (arXiv 1607.06450), section 3",
        assumptions=(
            Step(
                "Mean and variance",
                (mean(x), variance),
                stacked(
                    rf"m = \frac{{1}}{{{dim}}} \sum_k x_k",
                    rf"v = \frac{{1}}{{{dim}}} \sum_k (x_k - m)^2",
                ),
                "The mean and the variance are those of the entries of the one vector; the sum of squares is divided "
                "by their number.",
            ),
            Step(
                "Layer norm",
                result,
                LAYER_NORM,
                "Subtract the mean, divide by the square root of the variance plus $\\varepsilon \\ge 0$, then scale "
                "and shift each entry.",
            ),
            Step(
                "Something to divide by",
                sp.Ne(variance + eps, 0),
                r"v + \varepsilon \neq 0",
                "Either $\\varepsilon$ is positive or the vector is not constant.",
            ),
        ),
        steps=(
            Step(
                "Mean zero",
                rewritten(mean(normalised), sp.S.Zero),
                rf"\sum_k {NORMALISED} = 0",
                "The distances from the mean cancel in the sum, whatever they are divided by.",
            ),
            Step(
                "Variance",
                left,
                rf"\frac{{1}}{{{dim}}} \sum_k \Bigl({NORMALISED}\Bigr)^2 = \frac{{v}}{{v + \varepsilon}}",
                "The squares contain no root any more; with $\\varepsilon = 0$ the variance is one, and otherwise it "
                "is less.",
            ),
            Step(
                "A constant vector",
                rewritten(flat, shift),
                stacked(r"x = (c, \dots, c)", rf"\operatorname{{LN}}(x)_1 = {latex(flat[0])}"),
                "Nothing of it is left after the mean, so only the shift comes out, for any $\\varepsilon > 0$; "
                f"without a shift that is zero, and then there is nothing to read. {first_of(dim, 'entry', 'entries')}",
            ),
        ),
        result=result,
        latex=LAYER_NORM,
        arguments={"x": x, "gain": gain, "shift": shift, "eps": sp.ImmutableMatrix([eps])},
        shapes={"x": "dim", "gain": "dim", "shift": "dim", "eps": "", "return": "dim"},
        must_vanish=must_vanish,
    )
