r"""With several heads a token is a sum of steps of normalised LMS, one a head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.lms import SOURCE, STEP_RATE, WEIGHTS, asked_target, rate_without
from icl_lib.symbolic.notation import A_WITHOUT, SQUARED_NORM, checked_sizes, matrix, put, squared_norm, stacked, vector
from icl_lib.symbolic.recursion import BEFORE, NOW, RATE, softmax_recursion
from icl_lib.symbolic.token_step import gradient_of

HEAD_BEFORE, HEAD_NOW, HEAD_VALUE = r"\boldsymbol{a}_{i-1}^h", r"\boldsymbol{a}_i^h", r"\boldsymbol{v}_i^h"
TARGET = r"\boldsymbol{t}^h"
LOSS = rf"\ell^h(W') = \tfrac12 \|W' {A_WITHOUT} - {TARGET}\|^2"
HEADS_FORMULA = (
    rf"W_i = W_{{i-1}} - \sum_h \frac{{\alpha_i^h}}{{{SQUARED_NORM}}} \nabla \ell^h(W_{{i-1}})",
    LOSS,
)
TARGET_FORMULA = rf"{TARGET} = W ({BEFORE} - {HEAD_BEFORE} + {HEAD_VALUE})"


@lru_cache(maxsize=None, typed=True)
def normalised_lms_heads(out_features: int, in_features: int, heads: int) -> Derivation:
    r"""Derive that a token of multi-head softmax attention is one step of normalised LMS a head, all taken at once.

    $$W_i = W_{i-1} - \sum_h \frac{\alpha_i^h}{\|a_0\|^2}\, \nabla \ell^h(W_{i-1}), \qquad
    \ell^h(W') = \tfrac12 \|W' a_0 - t^h\|^2, \qquad t^h = W (a_{i-1} - a_{i-1}^h + v_i^h)$$

    What is read is a sum over heads, each an average with attention weights of its own. Head $h$ asks that the weights
    answer as if it had read token $i$ alone, and the other heads what they had read before. As in
    :func:`~icl_lib.symbolic.normalised_lms` the targets and rates are solved for: the target of a head shall not depend
    on what this head read before. It depends on what the others read, so it is the token's own with one head only.

    Source: this book.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $W_i$, is a function of ``W`` ``[out, in]``,
    ``W_before`` ``[out, in]``, which is $W_{i-1}$, ``a_without`` ``[in]``, ``a_before`` ``[heads, in]``, whose rows are
    $a_{i-1}^h$, ``v`` ``[heads, in]`` and ``alpha`` ``[heads]``.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = normalised_lms_heads(2, 2, 2)
    >>> derivation.check()
    True
    >>> W, a_0 = np.eye(2), np.array([1.0, 1.0])
    >>> a_before, v = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, 5.0]])
    >>> derivation.lambdify()(W, W, a_0, a_before, v, np.array([0.5, 0.25])) @ a_0
    array([2., 2.])
    """
    checked_sizes(heads=heads)
    least, recursion = weight_update(out_features, in_features), softmax_recursion()
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    before, weights = matrix("W^{i-1}", out_features, in_features), matrix("W'", out_features, in_features)
    reads, values = matrix("a^{i-1}", heads, in_features), matrix("v^{i}", heads, in_features)
    rates = sp.ImmutableMatrix([sp.Symbol(rf"\alpha_i^{h + 1}", positive=True) for h in range(heads)])
    target, square = vector("t", out_features), squared_norm(a0)

    by_head = [(alpha, reads.row(h).T, values.row(h).T) for h, alpha in enumerate(rates)]
    a_before = _total(read for _, read, _ in by_head)
    a_now = _total(
        recursion.result.xreplace(dict(zip(recursion.arguments.values(), of_head, strict=True))).doit()
        for of_head in by_head
    )
    weights_before, weights_now = (W + put(least.result, (aC, read)) for read in (a_before, a_now))
    answer = rewritten(weights_before * a0, W * a_before)

    step = weights_now - weights_before
    gradient = rewritten(gradient_of(squared_norm(weights * a0 - target) / 2, weights), (weights * a0 - target) * a0.T)
    parts, asked, found, step_rates, descents = [], [], [], [], []
    for alpha, read, value in by_head:
        column = alpha * W * (value - read) / square
        # The step is linear in the rates of the heads, and what one of them multiplies is the part of its head.
        parts.append(rewritten(alpha * sp.diff(step, alpha), column * a0.T))
        asked.append(asked_target(column, answer, target))
        _, step_rate = rate_without(asked[-1], read)
        found.append(rewritten(asked[-1].xreplace({STEP_RATE: step_rate}), W * (a_before - read + value)))
        step_rates.append(step_rate)
        descents.append(step_rate * put(gradient, (weights, before), (target, found[-1])))
    together = rewritten(step, _total(parts))

    result = before - _total(descents)
    towards_all = put(gradient, (weights, weights_before), (target, W * _total(value for _, _, value in by_head)))
    single = rewritten(together.xreplace(dict.fromkeys(rates, RATE)), -RATE / square * towards_all)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "step": put(candidate, (before, weights_before)) - weights_now,
            "gradient descent": candidate - before + _total(descents),
        }

    return Derivation(
        name="normalised_lms_heads",
        source=SOURCE,
        assumptions=(
            Step(
                "Several heads",
                a_now,
                stacked(
                    rf"{NOW} = \sum_h {HEAD_NOW}",
                    rf"{HEAD_NOW} = {HEAD_BEFORE} + \alpha_i^h\, ({HEAD_VALUE} - {HEAD_BEFORE})",
                ),
                "What is read is the sum over heads. Each head has attention weights and values of its own, and "
                "follows its own `softmax_recursion`.",
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
                "Before token $i$, the weights answer to the query alone as $W$ answers to what all heads read.",
            ),
            Step(
                "A part for each head",
                tuple(parts),
                stacked(
                    r"W_i - W_{i-1} = \sum_h S^h",
                    rf"S^h = \frac{{\alpha_i^h}}{{{SQUARED_NORM}}}\,"
                    rf" W ({HEAD_VALUE} - {HEAD_BEFORE})\, {A_WITHOUT}^{{\top}}",
                ),
                "SymPy subtracts. The step is linear in the rates of the heads, and what one of them multiplies is the "
                "part of its head.",
            ),
            Step(
                "Target for a rate",
                tuple(asked),
                stacked(
                    LOSS,
                    rf"{TARGET} = W {BEFORE}",
                    rf"{{}} + \frac{{\alpha_i^h}}{{\eta\, {SQUARED_NORM}}}\, W ({HEAD_VALUE} - {HEAD_BEFORE})",
                ),
                rf"For each head we ask which target ${TARGET}$ makes its part $-\eta\, \nabla \ell^h(W_{{i-1}})$, at "
                r"some rate $\eta$, and SymPy solves for it.",
            ),
            Step(
                "Rates",
                tuple(step_rates),
                stacked(
                    rf"\frac{{\partial {TARGET}}}{{\partial {HEAD_BEFORE}}} = 0",
                    rf"\eta = \frac{{\alpha_i^h}}{{{SQUARED_NORM}}}",
                ),
                "What a head asks for shall not depend on what it read itself before token $i$. That is so for one "
                "rate, which is the head's own.",
            ),
            Step(
                "Targets",
                tuple(found),
                TARGET_FORMULA,
                f"In ${BEFORE}$ the read of this head is replaced by the value of token $i$: it asks that the weights "
                "answer as if this head read the token alone, and the other heads what they read before.",
            ),
            Step(
                "All at once",
                together,
                stacked(*HEADS_FORMULA),
                "Every gradient is taken at $W_{i-1}$, and the steps are added.",
            ),
            Step(
                "Equal rates",
                single,
                stacked(
                    r"\alpha_i^h = \alpha_i \quad\text{for all } h",
                    rf"W_i = W_{{i-1}} - \frac{{\alpha_i}}{{{SQUARED_NORM}}}\, \nabla \ell_i(W_{{i-1}})",
                    rf"\ell_i(W') = \tfrac12 \bigl\|W' {A_WITHOUT} - W \textstyle\sum_h {HEAD_VALUE}\bigr\|^2",
                ),
                "If all heads give the token the same weight, they make one step of normalised LMS towards the sum of "
                "their values. Otherwise each head pulls by a weight of its own.",
            ),
        ),
        result=result,
        latex=stacked(*HEADS_FORMULA, TARGET_FORMULA),
        arguments={"W": W, "W_before": before, "a_without": a0, "a_before": reads, "v": values, "alpha": rates},
        shapes={
            "W": "out in",
            "W_before": "out in",
            "a_without": "in",
            "a_before": "heads in",
            "v": "heads in",
            "alpha": "heads",
            "return": "out in",
        },
        must_vanish=must_vanish,
    )


def _total(matrices: Iterable[sp.MatrixBase]) -> sp.MatrixBase:
    first, *others = matrices
    return sum(others, first)
