r"""With several heads a token is a sum of steps of normalised LMS, one for each head."""

from __future__ import annotations

from functools import lru_cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten, total
from icl_lib.symbolic.linear_losses import Tokens
from icl_lib.symbolic.normalised_lms import STEP_RATE, average_of, loss_towards, share_of
from icl_lib.symbolic.notation import OUT, checked_sizes, latex, matrix, number, squared_norm, vector

SOURCE = "This book"


@lru_cache(maxsize=None, typed=True)
def normalised_lms_heads(heads: int = 2) -> Derivation:
    r"""Derive that a token of multi-head softmax attention is one step of normalised LMS for each head, taken at once.

    $$W_i = W_{i-1} - \sum_h \frac{\alpha_i^h}{\|a_0\|^2}\, \nabla \ell_i^h(W_{i-1}), \qquad
    \ell_i^h(U) = \tfrac12 \|U a_0 - t_i^h\|^2, \qquad t_i^h = W (a_{i-1} - a_{i-1}^h + v_i^h)$$

    The layer outputs a sum over heads, each an average with attention weights of its own. The target of head $h$ is
    what $W$ computes if this head reads token $i$ alone and the other heads read what they had read before. As in
    :func:`~icl_lib.symbolic.normalised_lms`, targets and rates are solved for: the target of a head must not depend on
    what this head read before.

    Source: this book.

    Args:
        heads: how many heads the proof adds up; the sizes of the matrices are symbols.

    Shapes: the result, $W_i$, is a function of ``W`` ``[out, in]``, ``W_before`` ``[out, in]``, which is $W_{i-1}$,
    ``a_without`` ``[in]``, ``a_before`` ``[heads, in]``, whose rows are $a_{i-1}^h$, ``v`` ``[heads, in]`` and
    ``alpha`` ``[heads]``.

    Raises `ValueError` if the number of heads is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = normalised_lms_heads(2)
    >>> derivation.check()
    True
    >>> W, a_0 = np.eye(2), np.array([1.0, 1.0])
    >>> a_before, v = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, 5.0]])
    >>> derivation.lambdify()(W, W, a_0, a_before, v, np.array([0.5, 0.25])) @ a_0
    array([2., 2.])
    """
    checked_sizes(heads=heads)
    tokens = Tokens()
    W, a_0, before, now = tokens.W, tokens.a_0, tokens.before, tokens.now
    W_before, W_now = tokens.W_before, tokens.W_now
    U, norm = matrix("U"), squared_norm(a_0)

    # One head h stands for all; the instances are the heads that are added up.
    rate, head_before, value = (
        sp.Symbol(r"\alpha_i^h", positive=True),
        vector("a", index="i-1", upper="h"),
        vector("v", index="i", upper="h"),
    )
    head_now, target, own = vector("a", index="i", upper="h"), vector("t", OUT, "i", "h"), number(r"\ell_i^h(U)")
    head_step, slope = matrix("S^{h}"), matrix(r"\nabla\ell_i^h(W_{i-1})")
    rates = tuple(sp.Symbol(rf"\alpha_i^{k}", positive=True) for k in range(1, heads + 1))
    befores, values = (
        tuple(vector(letter, index=index, upper=str(k)) for k in range(1, heads + 1))
        for letter, index in (("a", "i-1"), ("v", "i"))
    )

    # The step is linear in the rates, and what one of them multiplies is the part of its head.
    column = rate / norm * W * (value - head_before)
    at_start = rewritten(expanded(tokens.weights[W_before] * a_0), W * before)
    asked = rewritten(
        solved(column + STEP_RATE * (at_start - target), target),
        W * before + rate / (STEP_RATE * norm) * W * (value - head_before),
    )
    others = vector("a", index="i-1", upper=r"\neq h")  # what the other heads have read
    share = share_of(asked.xreplace({before: others + head_before}), head_before)
    [found_rate] = sp.solve(share, STEP_RATE)
    found = rewritten(asked.xreplace({STEP_RATE: found_rate}), W * (before - head_before + value))
    descent = gradient(loss_towards(target, U, a_0), U).xreplace({U: W_before})

    by_head = {
        head_now: average_of(head_before, value, rate),
        head_step: column * a_0.T,
        target: found,
        slope: descent.xreplace({target: found}),
    }
    instances = tuple(
        {
            **{name: meaning.xreplace(of_head) for name, meaning in by_head.items()},
            **of_head,
        }
        for of_head in ({rate: r, head_before: b, value: v} for r, b, v in zip(rates, befores, values, strict=True))
    )
    sum_before, added_before = total(r"\sum_h", head_before, instances)
    sum_now, added_now = total(r"\sum_h", head_now, instances)
    sum_of_parts, added_parts = total(r"\sum_h", head_step, instances)
    sum_of_steps, added_steps = total(r"\sum_h", rate / norm * slope, instances)

    common, sum_of_values = number(r"\alpha_i"), vector("v", index="i")
    at_one_rate = added_parts.xreplace(dict.fromkeys(rates, common))

    return Derivation(
        name="normalised_lms_heads",
        source=SOURCE,
        assumptions=(
            Step(
                "heads",
                "Several heads",
                "The layer outputs the sum over heads. Each head has attention weights and values of its own "
                "(`running_average`).",
                Identity(now, sum_now),
                Identity(before, sum_before),
                Identity(head_now, average_of(head_before, value, rate)),
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
                "parts",
                "A part for each head",
                "We put the averages into both updates and subtract.",
                Identity(W_now - W_before, sum_of_parts),
                Identity(head_step, column * a_0.T),
            ),
            Step(
                "target for a rate",
                "A target for every rate",
                "We ask that the part of head $h$ be a gradient step at some rate $\\eta$, and solve for the target.",
                Identity(own, loss_towards(target, U, a_0)),
                Asked(target, asked),
            ),
            Step(
                "rate",
                "The rate",
                f"The target must not depend on ${latex(head_before)}$, what this head read before. So its coefficient "
                "must vanish, with the attention weight held fixed.",
                Asked(share, sp.S.Zero),
                Asked(STEP_RATE, found_rate),
            ),
            Step(
                "target",
                "The target",
                f"In ${latex(before)}$ the output of this head is replaced by the value of token $i$. The other heads "
                "keep what they have read.",
                Asked(target, W * (before - head_before + value)),
            ),
            Step(
                "together",
                "All heads at once",
                "Every gradient is taken at $W_{i-1}$, and the steps are added.",
                Identity(W_now, W_before - sum_of_steps),
            ),
            Step(
                "equal rates",
                "Equal rates",
                "If all heads give the token the same weight, they make one step towards "
                f"${latex(W * sum_of_values)}$, where ${latex(sum_of_values)}$ is the sum of their values. Otherwise "
                "each head has its own rate.",
                Identity(
                    at_one_rate_name := matrix(r"(W_i - W_{i-1})\big|_{\alpha_i^h = \alpha_i}"),
                    -common / norm * (W_before * a_0 - W * sum_of_values) * a_0.T,
                ),
            ),
        ),
        unknown=matrix("W'_i"),
        result=(W_before - added_steps).xreplace({before: added_before}),
        statement=Identity(W_now, W_before - sum_of_steps),
        arguments={"W": W, "W_before": W_before, "a_without": a_0, "a_before": befores, "v": values, "alpha": rates},
        shapes={
            "W": "out in",
            "W_before": "out in",
            "a_without": "in",
            "a_before": "heads in",
            "v": "heads in",
            "alpha": "heads",
            "return": "out in",
        },
        names={
            now: added_now,
            before: added_before,
            head_now: by_head[head_now],
            head_step: by_head[head_step],
            **tokens.weights,
            own: loss_towards(target, U, a_0),
            sum_now: added_now,
            sum_before: added_before,
            sum_of_parts: added_parts,
            sum_of_steps: added_steps,
            at_one_rate_name: at_one_rate,
            sum_of_values: sp.MatAdd(*values),
        },
        solution={target: found, STEP_RATE: found_rate},
        beyond=lambda candidate: (Identity(candidate, W_now),),
    )
