r"""A token of softmax attention is a step of normalised LMS: which loss, and which rate, comes out."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.notation import A_WITHOUT, SQUARED_NORM, matrix, put, squared_norm, stacked, vector
from icl_lib.symbolic.recursion import BEFORE, NOW, RATE, SOFTMAX_FORMULA, VALUE, softmax_recursion
from icl_lib.symbolic.token_step import gradient_of

SOURCE = "This book; normalised LMS: Nagumo and Noda 1967"
STEP_RATE = sp.Symbol(r"\eta", positive=True)
TARGET = r"\boldsymbol{t}"
WEIGHTS = rf"W_i = W + \frac{{W ({NOW} - {A_WITHOUT})\, {A_WITHOUT}^{{\top}}}}{{{SQUARED_NORM}}}"
LMS_FORMULA = (
    rf"W_i = W_{{i-1}} - \frac{{\alpha_i}}{{{SQUARED_NORM}}}\, \nabla \ell_i(W_{{i-1}})",
    rf"\ell_i(W') = \tfrac12 \|W' {A_WITHOUT} - W {VALUE}\|^2",
)


@lru_cache(maxsize=None, typed=True)
def normalised_lms(out_features: int, in_features: int) -> Derivation:
    r"""Derive that a token of softmax attention is a step of normalised LMS on a quadratic loss of its own.

    $$W_i = W_{i-1} - \frac{\alpha_i}{\|a_0\|^2}\, \nabla \ell_i(W_{i-1}), \qquad
    \ell_i(W') = \tfrac12 \|W' a_0 - W v_i\|^2$$

    $W_i$ are the weights that stand for the first $i$ tokens. SymPy is given the step and asked for a target $t$ such
    that it goes down the gradient of $\tfrac12 \|W' a_0 - t\|^2$. Every rate has one; that it must not depend on what
    was read before token $i$ came determines the rate, and with it the target $W v_i$.

    Source: this book, from Dherin et al., Theorem 2.2, and :func:`~icl_lib.symbolic.softmax_recursion`; normalised LMS
    is due to Nagumo and Noda (1967), the rule without the norm to Widrow and Hoff (1960).

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $W_i$, is a function of ``W`` ``[out, in]``,
    ``W_before`` ``[out, in]``, which is $W_{i-1}$, ``a_without`` ``[in]``, ``v`` ``[in]`` and ``alpha`` ``[]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = normalised_lms(2, 2)
    >>> derivation.check()
    True
    >>> W, a_0, v = np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0])
    >>> derivation.lambdify()(W, W, a_0, v, np.array(0.5)) @ a_0  # half the way from a_0 to v
    array([2., 1.])
    """
    least, recursion = weight_update(out_features, in_features), softmax_recursion()
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    a_before, v = vector("a", in_features, "i-1"), vector("v", in_features, "i")
    before, weights = matrix("W^{i-1}", out_features, in_features), matrix("W'", out_features, in_features)
    target, square = vector("t", out_features), squared_norm(a0)

    wholes = dict(zip(recursion.arguments.values(), (RATE, a_before, v), strict=True))
    a_now = recursion.result.xreplace(wholes).doit()
    weights_before, weights_now = (W + put(least.result, (aC, read)) for read in (a_before, a_now))

    answer = rewritten(weights_before * a0, W * a_before)
    column = RATE * W * (v - a_before) / square
    step = rewritten(weights_now - weights_before, column * a0.T)

    loss = squared_norm(weights * a0 - target) / 2
    gradient = rewritten(gradient_of(loss, weights), (weights * a0 - target) * a0.T)
    asked = asked_target(column, answer, target)
    dependence, rate = rate_without(asked, a_before)
    rewritten(dependence, (1 - RATE / (STEP_RATE * square)) * W)
    found = rewritten(asked.xreplace({STEP_RATE: rate}), W * v)

    descent = rate * put(gradient, (weights, before), (target, found))
    result = before - descent
    residual = rewritten(result * a0 - W * v, (1 - RATE) * (before * a0 - W * v))

    # With positive names for the two norms, SymPy takes the root.
    moved, size = sp.Dummy(nonnegative=True), sp.Dummy(positive=True)
    norms = {moved: sp.sqrt(squared_norm(W * (v - a_before))), size: sp.sqrt(square)}
    squared = RATE**2 * moved**2 / size**2
    rewritten(squared_norm(step), squared.xreplace(norms))
    increment = sp.sqrt(squared).xreplace(norms)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "step": put(candidate, (before, weights_before)) - weights_now,
            "gradient descent": candidate - before + descent,
        }

    return Derivation(
        name="normalised_lms",
        source=SOURCE,
        assumptions=(
            Step(
                "Softmax attention",
                a_now,
                SOFTMAX_FORMULA,
                f"Token $i$ moves what is read towards its value ${VALUE}$ by its attention weight $\\alpha_i$: this "
                "is `softmax_recursion`.",
            ),
            Step(
                "Weights after some tokens",
                (weights_before, weights_now),
                WEIGHTS,
                "The weights that stand for the first $i$ tokens have their update: this is `weight_update`.",
            ),
            least.step("Something to read"),
        ),
        steps=(
            Step(
                "Answer so far",
                answer,
                rf"W_{{i-1}} {A_WITHOUT} = W {BEFORE}",
                "Before token $i$, the weights answer to the query alone as $W$ answers to what was read.",
            ),
            Step(
                "Step",
                step,
                stacked(
                    r"W_i - W_{i-1}",
                    rf"{{}} = \frac{{\alpha_i}}{{{SQUARED_NORM}}}\, W ({VALUE} - {BEFORE})\, {A_WITHOUT}^{{\top}}",
                ),
                "SymPy puts the recursion into both updates and subtracts.",
            ),
            Step(
                "A quadratic loss",
                gradient,
                stacked(
                    rf"\ell(W') = \tfrac12 \|W' {A_WITHOUT} - {TARGET}\|^2",
                    rf"\nabla \ell(W') = (W' {A_WITHOUT} - {TARGET})\, {A_WITHOUT}^{{\top}}",
                ),
                f"We ask for a loss that wants something of the weights: that they send ${A_WITHOUT}$ to a target "
                f"${TARGET}$, not yet known. Its gradient is a column times the same row as the step.",
            ),
            Step(
                "Target for a rate",
                asked,
                stacked(
                    rf"{TARGET} = W {BEFORE}",
                    rf"{{}} + \frac{{\alpha_i}}{{\eta\, {SQUARED_NORM}}}\, W ({VALUE} - {BEFORE})",
                ),
                "The step is $-\\eta\\, \\nabla \\ell(W_{i-1})$ where the columns are equal, and SymPy solves for the "
                "target. Every rate $\\eta$ has one.",
            ),
            Step(
                "Rate",
                (dependence, rate),
                stacked(
                    rf"\frac{{\partial {TARGET}}}{{\partial {BEFORE}}}"
                    rf" = \Bigl(1 - \frac{{\alpha_i}}{{\eta\, {SQUARED_NORM}}}\Bigr)\, W",
                    rf"\eta = \frac{{\alpha_i}}{{{SQUARED_NORM}}}",
                ),
                "What token $i$ asks for shall not depend on what was read before it. For one rate only, whatever $W$ "
                "is, the derivative of the target is zero.",
            ),
            Step(
                "Normalised LMS",
                (found, result),
                stacked(rf"{TARGET} = W {VALUE}", *LMS_FORMULA),
                f"With this rate the target is $W {VALUE}$: as if the query had read token $i$ alone, not even itself. "
                f"That the rate is divided by ${SQUARED_NORM}$ is what makes LMS normalised.",
            ),
            Step(
                "Its own loss",
                residual,
                stacked(
                    rf"W_i {A_WITHOUT} - W {VALUE}",
                    rf"{{}} = (1 - \alpha_i)\, (W_{{i-1}} {A_WITHOUT} - W {VALUE})",
                ),
                "Of what the token asks, the step leaves the part $1 - \\alpha_i$, so its loss falls by the factor "
                "$(1 - \\alpha_i)^2$. With $\\alpha_i = 1$ nothing would be left: that is Kaczmarz's step.",
            ),
            Step(
                "Size of the step",
                increment,
                rf"\|W_i - W_{{i-1}}\|_F = \alpha_i\, \frac{{\|W ({VALUE} - {BEFORE})\|}}{{\|{A_WITHOUT}\|}}",
                "The Frobenius norm of a column times a row is the product of their norms. Where attention is spread "
                "over many tokens, each weight is small, and so is each step.",
            ),
        ),
        result=result,
        latex=stacked(*LMS_FORMULA),
        arguments={"W": W, "W_before": before, "a_without": a0, "v": v, "alpha": sp.ImmutableMatrix([RATE])},
        shapes={"W": "out in", "W_before": "out in", "a_without": "in", "v": "in", "alpha": "", "return": "out in"},
        must_vanish=must_vanish,
    )


def asked_target(column: sp.MatrixBase, answer: sp.MatrixBase, target: sp.MatrixBase) -> sp.ImmutableMatrix:
    r"""Return the target for which a step $u a_0^\top$ is $-\eta$ times the gradient of $\tfrac12 \|W' a_0 - t\|^2$.

    Both are a column times $a_0^\top$, which is not zero, so they are equal where the columns are. Before the step the
    weights answer to $a_0$ with ``answer``.
    """
    solved = target.xreplace(sp.solve(list(column + STEP_RATE * (answer - target)), list(target)))
    return rewritten(solved, answer + column / STEP_RATE)


def rate_without(asked: sp.MatrixBase, read: sp.MatrixBase) -> tuple[sp.ImmutableMatrix, sp.Expr]:
    """Return how a target depends on what was read, and the rate for which it does not."""
    dependence = asked.jacobian(read)
    [solved] = sp.solve(list(dependence), [STEP_RATE], dict=True)
    return dependence, solved[STEP_RATE]
