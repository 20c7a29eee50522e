r"""What one more token does to the weights, and the loss of which that is a gradient step."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.notation import A_WITHOUT, SQUARED_NORM, inner, matrix, put, squared_norm, stacked, vector

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), Proposition 3.1"
NOW, NEXT = r"\boldsymbol{a}_i", r"\boldsymbol{a}_{i+1}"
STEP_FORMULA = rf"W_{{i+1}} - W_i = \frac{{W ({NEXT} - {NOW})\, {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}"
GRADIENT = rf"\Delta_i = W ({NOW} - {NEXT})\, {A_WITHOUT}^{{\top}}"


@lru_cache(maxsize=None, typed=True)
def gradient_step(out_features: int, in_features: int) -> Derivation:
    r"""Derive what token $i + 1$ adds to the weights, and a loss that makes it a step of gradient descent.

    $$W_{i+1} - W_i = \frac{W (a_{i+1} - a_i)\, a_0^\top}{\|a_0\|^2} = -\eta\, \nabla L_i(W_i), \qquad
    L_i(W') = \operatorname{tr}(\Delta_i^\top W'), \quad \eta = \frac{1}{\|a_0\|^2}, \quad
    \Delta_i = W (a_i - a_{i+1})\, a_0^\top$$

    $a_i = A(c_1 \dots c_i, x)$ is read after $i$ tokens, and $W_i = W + \Delta W(c_1 \dots c_i)$ stands for them. The
    loss is asked for: SymPy solves for an unknown linear one whose gradient step this is. The last steps say what that
    is worth: the same question has an answer for any two matrices, and a linear loss has no minimum.

    Source: Dherin et al., Proposition 3.1 ($h$ for $\eta$); that any sequence of matrices has such losses: this book.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, the step $W_{i+1} - W_i$, is a function of ``W``
    ``[out, in]``, ``a_without`` ``[in]``, ``a_now`` ``[in]`` and ``a_next`` ``[in]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = gradient_step(2, 2)
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]), np.array([5.0, 0.0]))
    array([[ 1. ,  1. ],
           [-0.5, -0.5]])
    """
    least = weight_update(out_features, in_features)
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    now, after = vector("a", in_features, "i"), vector("a", in_features, "i+1")
    square, rate = squared_norm(a0), sp.Symbol(r"\eta", positive=True)

    weights_now, weights_next = (W + put(least.result, (aC, read)) for read in (now, after))
    step = rewritten(weights_next - weights_now, W * (after - now) * a0.T / square)

    weights, unknown = matrix("W'", out_features, in_features), matrix("G", out_features, in_features)
    loss = inner(unknown, weights)
    gradient = gradient_of(loss, weights)

    def gradient_asked_by(difference: sp.MatrixBase) -> sp.MatrixBase:
        return unknown.xreplace(sp.solve(list(difference + rate * gradient), list(unknown)))

    asked = rewritten(gradient_asked_by(step), -step / rate)
    found = rewritten(asked.xreplace({rate: 1 / square}), W * (now - after) * a0.T)
    linear = put(loss, (unknown, found))
    descent = rewritten(weights_next, weights_now - gradient_of(linear, weights) / square)

    M, M_next = matrix("M^{i}", out_features, in_features), matrix("M^{i+1}", out_features, in_features)
    of_any = rewritten(gradient_asked_by(M_next - M), (M - M_next) / rate)

    distance = sp.Symbol("t", real=True)
    along = rewritten(put(linear, (weights, weights - distance * found)), linear - distance * squared_norm(found))

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "step": weights_next - weights_now - candidate,
            "effect": (weights_now + candidate) * a0 - W * after,
            "gradient descent": candidate + gradient_of(linear, weights) / square,
        }

    return Derivation(
        name="gradient_step",
        source=SOURCE,
        assumptions=(
            Step(
                "Weights after some tokens",
                (weights_now, weights_next),
                stacked(
                    rf"W_i = W + \frac{{W ({NOW} - {A_WITHOUT})\, {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}",
                    rf"{NOW} = A(c_1 \dots c_i, x)",
                ),
                f"The tokens arrive one at a time. The weights that stand for the first $i$ have the update of "
                f"`weight_update`, with ${NOW}$, what is read by then, for $\\boldsymbol{{a}}_C$.",
            ),
            least.step("Something to read"),
        ),
        steps=(
            Step(
                "Step",
                step,
                STEP_FORMULA,
                f"SymPy subtracts: what is read without any token, ${A_WITHOUT}$, cancels on the left and stays on the "
                "right, the same for every token.",
            ),
            Step(
                "A linear loss, unknown",
                gradient,
                stacked(r"L(W') = \operatorname{tr}(G^{\top} W')", r"\nabla L = G"),
                "We ask for a loss of which this is a gradient step, $-\\eta\\, \\nabla L$. Take a linear one with "
                "unknown coefficients $G$: its derivatives are the coefficients, wherever it is taken.",
            ),
            Step(
                "Its coefficients",
                asked,
                r"G = -\frac{1}{\eta}\, (W_{i+1} - W_i)",
                f"SymPy solves $W_{{i+1}} - W_i = -\\eta\\, G$ for the {len(unknown)} coefficients. Only $\\eta\\, G$ "
                "is determined: every rate has its loss.",
            ),
            Step(
                "Rate",
                found,
                stacked(rf"\eta = \frac{{1}}{{{SQUARED_NORM}}}", rf"G = {GRADIENT}"),
                "With this rate nothing is left of the denominator: this is the loss of Proposition 3.1.",
            ),
            Step(
                "Gradient descent",
                descent,
                stacked(r"W_{i+1} = W_i - \eta\, \nabla L_i(W_i)", r"L_i(W') = \operatorname{tr}(\Delta_i^{\top} W')"),
                "So each token is a step of gradient descent, at one rate, on a loss of its own.",
            ),
            Step(
                "Any two matrices",
                of_any,
                stacked(
                    r"L(W') = \tfrac{1}{\eta} \operatorname{tr}\bigl((M_i - M_{i+1})^{\top} W'\bigr)",
                    r"M_{i+1} = M_i - \eta\, \nabla L(M_i)",
                ),
                "The loss was read off the step. SymPy solves the same equation for any two matrices, so any "
                "sequence of matrices whatever is gradient descent on such losses.",
            ),
            Step(
                "No minimum",
                along,
                r"L_i(W' - t\, \Delta_i) = L_i(W') - t\, \|\Delta_i\|_F^2",
                "Unless it is zero, the loss falls without end down its gradient, as any linear function does: it says "
                "in which direction to go, and nothing of where to stop.",
            ),
        ),
        result=step,
        latex=stacked(STEP_FORMULA, rf"{{}} = -\frac{{1}}{{{SQUARED_NORM}}}\, \nabla L_i(W_i)"),
        arguments={"W": W, "a_without": a0, "a_now": now, "a_next": after},
        shapes={"W": "out in", "a_without": "in", "a_now": "in", "a_next": "in", "return": "out in"},
        must_vanish=must_vanish,
    )


def gradient_of(loss: sp.Expr, by: sp.MatrixBase) -> sp.ImmutableMatrix:
    """Differentiate a number by every entry of a matrix."""
    return sp.ImmutableMatrix(*by.shape, [sp.diff(loss, entry) for entry in by])
