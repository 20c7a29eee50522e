r"""One token of softmax attention is one step of normalised LMS."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, multiplied_out, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten
from icl_lib.symbolic.linear_losses import Tokens
from icl_lib.symbolic.notation import IN, OUT, latex, matrix, number, squared_norm, vector
from icl_lib.symbolic.running_average import BEFORE, RATE, VALUE, running_average

SOURCE = "This book; normalised LMS: Nagumo and Noda 1967; test-time regression: Wang et al. 2025 (arXiv 2501.12352)"
STEP_RATE = sp.Symbol(r"\eta", positive=True)


def average_of(before: sp.MatrixExpr, value: sp.MatrixExpr, rate: sp.Expr) -> sp.MatrixExpr:
    """Return what a head outputs with one more token (`running_average`)."""
    recursion = running_average()
    sized = {symbol: sp.MatrixSymbol(symbol.name, IN, 1) for symbol in (BEFORE, VALUE)}
    return recursion.result.xreplace(sized).xreplace({sized[BEFORE]: before, sized[VALUE]: value, RATE: rate})


def loss_towards(target: sp.MatrixExpr, U: sp.MatrixExpr, a_0: sp.MatrixExpr) -> sp.Expr:
    """Return half the squared distance between the output of weights U and a target."""
    return squared_norm(U * a_0 - target) / 2


@cache
def normalised_lms() -> Derivation:
    r"""Derive that a token of one softmax head is a step of normalised LMS, and on which loss.

    $$W_i = W_{i-1} - \frac{\alpha_i}{\|a_0\|^2}\, \nabla \ell_i(W_{i-1}), \qquad
    \ell_i(U) = \tfrac12 \|U a_0 - W v_i\|^2$$

    The target and the rate are solved for. For every rate there is a target that makes the step a gradient step. For
    one rate only, with $\alpha_i$ held fixed, the target does not depend on $a_{i-1}$, and then it is $W v_i$. (The
    attention weight $\alpha_i$ itself depends on the scores of the earlier tokens.)

    Source: this book; normalised LMS: Nagumo and Noda 1967; softmax attention as a local regression: Wang et al. 2025
    (arXiv 2501.12352).

    Shapes: the result, $W_i$, is a function of ``W`` ``[out, in]``, ``W_before`` ``[out, in]``, which is $W_{i-1}$,
    ``a_without`` ``[in]``, ``v`` ``[in]`` and ``alpha``, an array without dimensions.

    >>> import numpy as np
    >>> derivation = normalised_lms()
    >>> derivation.check()
    True
    >>> W, a_0, v = np.eye(2), np.array([1.0, 0.0]), np.array([0.0, 4.0])
    >>> derivation.lambdify()(W, W, a_0, v, np.array(0.25))
    array([[0.75, 0.  ],
           [1.  , 1.  ]])
    """
    tokens = Tokens()
    W, a_0, before, now, value = tokens.W, tokens.a_0, tokens.before, tokens.now, vector("v", index="i")
    W_before, W_now = tokens.W_before, tokens.W_now
    U, target, own = matrix("U"), vector("t", OUT, "i"), number(r"\ell_i(U)")
    slope, for_rate = matrix(r"\nabla\ell_i(U)"), vector("t", OUT, "i", r"(\eta)")
    read = average_of(before, value, RATE)
    norm = squared_norm(a_0)

    step = rewritten(
        (tokens.weights[W_now] - tokens.weights[W_before]).xreplace({now: read}),
        RATE / norm * W * (value - before) * a_0.T,
    )
    # The step and the gradient are columns times the same row: equate the columns, and solve for the target.
    at_start = rewritten(expanded(tokens.weights[W_before] * a_0), W * before)
    column = RATE / norm * W * (value - before)
    asked = rewritten(
        solved(column + STEP_RATE * (at_start - target), target),
        W * before + RATE / (STEP_RATE * norm) * W * (value - before),
    )
    # The target is linear in a_{i-1}: what multiplies W a_{i-1} must vanish.
    share = share_of(asked, before)
    [found_rate] = sp.solve(share, STEP_RATE)
    found = rewritten(asked.xreplace({STEP_RATE: found_rate}), W * value)
    result = W_before - RATE / norm * (W_before * a_0 - W * value) * a_0.T

    return Derivation(
        name="normalised_lms",
        source=SOURCE,
        assumptions=(
            Step(
                "average",
                "Softmax attention",
                f"Token $i$ moves what is read towards its value ${latex(value)}$ by its attention weight $\\alpha_i$ "
                "(`running_average`).",
                Identity(now, read),
            ),
            tokens.assumption(),
            tokens.nonzero,
        ),
        steps=(
            Step(
                "before",
                "Before the step",
                f"The weights $W_{{i-1}}$ map ${latex(a_0)}$ to what $W$ computes from ${latex(before)}$.",
                Identity(W_before * a_0, W * before),
            ),
            Step(
                "step",
                "The step",
                "We put the average into both updates and subtract.",
                Identity(W_now - W_before, step),
            ),
            Step(
                "loss",
                "A quadratic loss with an unknown target",
                f"Its gradient is a column times ${latex(a_0.T)}$, like the step.",
                Identity(own, loss_towards(target, U, a_0)),
                Identity(slope, (U * a_0 - target) * a_0.T),
            ),
            Step(
                "target for a rate",
                "A target for every rate",
                "We ask that the step be a gradient step at rate $\\eta$, and solve for the target.",
                Identity(W_now, W_before - STEP_RATE * (W_before * a_0 - for_rate) * a_0.T),
                Identity(for_rate, asked),
            ),
            Step(
                "rate",
                "The rate",
                f"The target must not depend on ${latex(before)}$. So the coefficient of ${latex(W * before)}$ in it "
                "must vanish, with $\\alpha_i$ held fixed. That determines the rate.",
                Asked(share, sp.S.Zero),
                Asked(STEP_RATE, found_rate),
            ),
            Step(
                "target",
                "The target",
                f"With this rate the target is what $W$ computes from ${latex(value)}$, the value of token $i$ alone. "
                "The rate is divided by the squared length of the input, which is what makes LMS normalised.",
                Asked(target, for_rate, found),
                Asked(own, squared_norm(U * a_0 - found) / 2),
                Identity(W_now, result),
            ),
            Step(
                "own loss",
                "Its own loss",
                "The step multiplies the distance to the target by $1 - \\alpha_i$, and the loss by its square. With "
                "$\\alpha_i = 1$ the distance would be zero: that is Kaczmarz's step.",
                Identity(W_now * a_0 - W * value, (1 - RATE) * (W_before * a_0 - W * value)),
            ),
            Step(
                "size",
                "Size of the step",
                "Where attention is spread over many tokens, each weight is small, and so is each step.",
                Identity(squared_norm(W_now - W_before), RATE**2 * squared_norm(W * (value - before)) / norm),
            ),
        ),
        unknown=matrix("W'_i"),
        result=result,
        statement=Identity(W_now, result),
        arguments={"W": W, "W_before": W_before, "a_without": a_0, "v": value, "alpha": RATE},
        shapes={"W": "out in", "W_before": "out in", "a_without": "in", "v": "in", "alpha": "", "return": "out in"},
        names={
            now: read,
            **tokens.weights,
            own: loss_towards(target, U, a_0),
            slope: gradient(loss_towards(target, U, a_0), U),
            for_rate: asked,
        },
        solution={target: found, STEP_RATE: found_rate},
        beyond=lambda candidate: (
            Identity(candidate, W_now),
            Identity(
                candidate, W_before - found_rate * gradient(loss_towards(found, U, a_0), U).xreplace({U: W_before})
            ),
        ),
    )


def share_of(of: sp.MatrixExpr, read: sp.MatrixSymbol) -> sp.Expr:
    """Return the number in front of W times what was read."""
    return sp.Add(*(number for word, number in multiplied_out(of).items() if word[-1] == read))
