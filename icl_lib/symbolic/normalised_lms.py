r"""One token of softmax attention is one step of normalised LMS."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, multiplied_out, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten
from icl_lib.symbolic.linear_losses import Tokens
from icl_lib.symbolic.notation import IN, OUT, latex, matrix, number, squared_norm, vector
from icl_lib.symbolic.running_average import BEFORE, RATE, VALUE, running_average

SOURCE = "This book; normalised LMS: Nagumo and Noda 1967; test-time regression: Wang et al. 2025 (arXiv 2501.12352)"
STEP_RATE = sp.Symbol(r"\eta", positive=True)
OWN_LOSS, FOR_RATE = number(r"\ell_i(U)"), vector("t", OUT, "i", r"(\eta)")


def average_of(before: sp.MatrixExpr, value: sp.MatrixExpr, rate: sp.Expr) -> sp.MatrixExpr:
    """Return what a head outputs with one more token (`running_average`)."""
    recursion = running_average()
    sized = {symbol: sp.MatrixSymbol(symbol.name, IN, 1) for symbol in (BEFORE, VALUE)}
    return recursion.result.xreplace(sized).xreplace({sized[BEFORE]: before, sized[VALUE]: value, RATE: rate})


class HeadStep:
    """The part of a token's step that one head makes, and the quadratic loss of which it is a gradient step."""

    def __init__(self, tokens: Tokens, before: Any, value: Any, rate: Any, target: Any) -> None:
        W, a_0 = tokens.W, tokens.a_0
        self.U, self.a_0 = matrix("U"), a_0
        # The step and the gradient are columns times the same row: equate the columns, and solve for the target.
        self.column = rate / squared_norm(a_0) * W * (value - before)
        at_start = rewritten(expanded(tokens.weights[tokens.W_before] * a_0), W * tokens.before)
        self.at_any_rate = rewritten(
            solved(self.column + STEP_RATE * (at_start - target), target),
            W * tokens.before + rate / (STEP_RATE * squared_norm(a_0)) * W * (value - before),
        )
        # The target is linear in what this head read before: what multiplies it must vanish.
        other_heads = vector("a", index="i-1", upper=r"\neq h")
        words = multiplied_out(self.at_any_rate.xreplace({tokens.before: other_heads + before})).items()
        self.share = sp.Add(*(number for word, number in words if word[-1] == before))
        [self.rate] = sp.solve(self.share, STEP_RATE)
        self.target = rewritten(self.at_any_rate.xreplace({STEP_RATE: self.rate}), W * (tokens.before - before + value))
        self.loss = self.loss_towards(target)
        self.gradient = gradient(self.loss, self.U)
        self.descent = self.gradient.xreplace({target: self.target, self.U: tokens.W_before})
        self.solution = {target: self.target, STEP_RATE: self.rate}

    def loss_towards(self, target: Any) -> sp.Expr:
        """Return half the squared distance between the output of weights U and a target."""
        return squared_norm(self.U * self.a_0 - target) / 2


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
    tokens, value, target = Tokens(), vector("v", index="i"), vector("t", OUT, "i")
    W, a_0, before, now, W_before, W_now = tokens.symbols
    head, read = HeadStep(tokens, before, value, RATE, target), average_of(before, value, RATE)
    step = (tokens.weights[W_now] - tokens.weights[W_before]).xreplace({now: read})
    to_target = W_before * a_0 - W * value
    norm = squared_norm(a_0)
    result = W_before - RATE / norm * to_target * a_0.T
    told, names = _loss(tokens, head, target)

    return Derivation(
        name="normalised_lms",
        source=SOURCE,
        assumptions=dict(
            average=Step(
                f"**Softmax attention.** Token $i$ moves what is read towards its value ${latex(value)}$ by its "
                "attention weight $\\alpha_i$ (`running_average`).",
                Identity(now, read),
            ),
            **tokens.assumptions(),
        ),
        steps=dict(
            before=tokens.before_the_step(),
            step=Step(
                "**The step.** We put the average into both updates and subtract.",
                Identity(W_now - W_before, rewritten(step, head.column * a_0.T)),
            ),
            **told,
            target=Step(
                f"**The target.** With this rate the target is what $W$ computes from ${latex(value)}$, the value of "
                "token $i$ alone. The rate is divided by the squared length of the input, which is what makes LMS "
                "normalised.",
                Asked(target, FOR_RATE, head.target),
                Asked(OWN_LOSS, head.loss_towards(head.target)),
                Identity(W_now, result),
            ),
            own_loss=Step(
                "**Its own loss.** The step multiplies the distance to the target by $1 - \\alpha_i$, and the loss by "
                "its square. With $\\alpha_i = 1$ the distance would be zero: that is Kaczmarz's step.",
                Identity(W_now * a_0 - W * value, (1 - RATE) * to_target),
            ),
            size=Step(
                "**Size of the step.** Where attention is spread over many tokens, each weight is small, and so is "
                "each step.",
                Identity(squared_norm(W_now - W_before), RATE**2 * squared_norm(W * (value - before)) / norm),
            ),
        ),
        unknown=matrix("W'_i"),
        result=result,
        statement=Identity(W_now, result),
        arguments={"W": W, "W_before": W_before, "a_without": a_0, "v": value, "alpha": RATE},
        names={now: read, **tokens.weights, **names},
        solution=head.solution,
        beyond=lambda candidate: (Identity(candidate, W_now), Identity(candidate, W_before - head.rate * head.descent)),
    )


def _loss(tokens: Tokens, head: HeadStep, target: Any) -> tuple[dict[str, Step], dict[Any, Any]]:
    """Return the steps that find a loss and its rate, and the names in them."""
    a_0, before, W_before = tokens.a_0, tokens.before, tokens.W_before
    slope = matrix(r"\nabla\ell_i(U)")
    steps = dict(
        loss=Step(
            f"**A quadratic loss with an unknown target.** Its gradient is a column times ${latex(a_0.T)}$, like the "
            "step.",
            Identity(OWN_LOSS, head.loss),
            Identity(slope, (head.U * a_0 - target) * a_0.T),
        ),
        target_for_a_rate=Step(
            "**A target for every rate.** We ask that the step be a gradient step at rate $\\eta$, and solve for the "
            "target.",
            Identity(tokens.W_now, W_before - STEP_RATE * (W_before * a_0 - FOR_RATE) * a_0.T),
            Identity(FOR_RATE, head.at_any_rate),
        ),
        rate=Step(
            f"**The rate.** The target must not depend on ${latex(before)}$. So the coefficient of "
            f"${latex(tokens.W * before)}$ in it must vanish, with $\\alpha_i$ held fixed. That determines the rate.",
            Asked(head.share, sp.S.Zero),
            Asked(STEP_RATE, head.rate),
        ),
    )
    return steps, {OWN_LOSS: head.loss, slope: head.gradient, FOR_RATE: head.at_any_rate}
