r"""With several heads a token is a sum of steps of normalised LMS, one for each head."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, total
from icl_lib.symbolic.linear_losses import Tokens
from icl_lib.symbolic.normalised_lms import STEP_RATE, HeadStep, average_of
from icl_lib.symbolic.notation import OUT, checked_sizes, latex, matrix, number, rank_one, squared_norm, vector


class Heads:
    """One head h, which stands for all, and the heads that are added up."""

    def __init__(self, tokens: Tokens, count: int) -> None:
        self.rate, self.value = sp.Symbol(r"\alpha_i^h", positive=True), vector("v", index="i", upper="h")
        self.before, self.now = (vector("a", index=index, upper="h") for index in ("i-1", "i"))
        self.part, self.target = matrix("S^{h}"), vector("t", OUT, "i", "h")
        self.step = HeadStep(tokens, self.before, self.value, self.rate, self.target)
        self.names = {
            self.now: average_of(self.before, self.value, self.rate),
            self.part: self.step.column * tokens.a_0.T,
        }
        self.slope, self.own_loss = matrix(r"\nabla\ell_i^h(W_{i-1})"), number(r"\ell_i^h(U)")

        numbers = range(1, count + 1)
        self.rates = tuple(sp.Symbol(rf"\alpha_i^{k}", positive=True) for k in numbers)
        self.befores = tuple(vector("a", index="i-1", upper=str(k)) for k in numbers)
        self.values = tuple(vector("v", index="i", upper=str(k)) for k in numbers)
        self.arguments = {"a_before": self.befores, "v": self.values, "alpha": self.rates}
        by_head, self.instances = {**self.names, self.slope: self.step.descent}, []
        for own in zip(self.rates, self.befores, self.values, strict=True):
            of_head = dict(zip((self.rate, self.before, self.value), own, strict=True))
            self.instances.append({name: meaning.xreplace(of_head) for name, meaning in by_head.items()} | of_head)
        self.names[self.own_loss] = self.step.loss

    def sum(self, term: Any) -> Any:
        """Return the symbol of a sum over heads, whose terms are added to the names."""
        symbol, self.names[symbol] = total(r"\sum_h", term, tuple(self.instances))
        return symbol

    def own_steps(self, before: Any) -> dict[str, Step]:
        """Return the steps that find the loss of a head and its rate."""
        return dict(
            target_for_a_rate=Step(
                "**A target for every rate.** We ask that the part of head $h$ be a gradient step at some rate "
                "$\\eta$, and solve for the target.",
                Identity(self.own_loss, self.step.loss),
                Asked(self.target, self.step.at_any_rate),
            ),
            rate=Step(
                f"**The rate.** The target must not depend on ${latex(self.before)}$, what this head read before. So "
                "its coefficient must vanish, with the attention weight held fixed.",
                Asked(self.step.share, sp.S.Zero),
                Asked(STEP_RATE, self.step.rate),
            ),
            target=Step(
                f"**The target.** In ${latex(before)}$ the output of this head is replaced by the value of token $i$. "
                "The other heads keep what they have read.",
                Asked(self.target, self.step.target),
            ),
        )


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
    W, a_0, before, now, W_before, W_now = tokens.symbols
    head = Heads(tokens, heads)
    sum_before, sum_now, sum_of_parts = head.sum(head.before), head.sum(head.now), head.sum(head.part)
    sum_of_steps = head.sum(head.rate / squared_norm(a_0) * head.slope)
    equal, at_one_rate = _equal_rates(tokens, head, head.names[sum_of_parts])
    names = {now: head.names[sum_now], before: head.names[sum_before], **at_one_rate}

    return Derivation(
        name="normalised_lms_heads",
        source="This book",
        assumptions=dict(
            heads=Step(
                "**Several heads.** The layer outputs the sum over heads. Each head has attention weights and values "
                "of its own (`running_average`).",
                Identity(now, sum_now),
                Identity(before, sum_before),
                Identity(head.now, head.names[head.now]),
            ),
            **tokens.assumptions(),
        ),
        steps=dict(
            before=tokens.before_the_step(),
            parts=Step(
                "**A part for each head.** We put the averages into both updates and subtract.",
                Identity(W_now - W_before, sum_of_parts),
                Identity(head.part, head.names[head.part]),
            ),
            **head.own_steps(before),
            together=Step(
                "**All heads at once.** Every gradient is taken at $W_{i-1}$, and the steps are added.",
                Identity(W_now, W_before - sum_of_steps),
            ),
            equal_rates=equal,
        ),
        unknown=matrix("W'_i"),
        result=(W_before - head.names[sum_of_steps]).xreplace({before: names[before]}),
        statement=Identity(W_now, W_before - sum_of_steps),
        arguments={"W": W, "W_before": W_before, "a_without": a_0, **head.arguments},
        names={**tokens.weights, **head.names, **names},
        solution=head.step.solution,
        beyond=lambda candidate: (Identity(candidate, W_now),),
    )


def _equal_rates(tokens: Tokens, head: Heads, parts: Any) -> tuple[Step, dict[Any, Any]]:
    """Return what the heads do together if all give the token the same weight, and the names in it."""
    rate, values = number(r"\alpha_i"), vector("v", index="i")
    at_one_rate = matrix(r"(W_i - W_{i-1})\big|_{\alpha_i^h = \alpha_i}")
    step = Step(
        "**Equal rates.** If all heads give the token the same weight, they make one step towards "
        f"${latex(tokens.W * values)}$, where ${latex(values)}$ is the sum of their values. Otherwise each head has "
        "its own rate.",
        Identity(at_one_rate, -rate * rank_one(tokens.W_before * tokens.a_0 - tokens.W * values, tokens.a_0)),
    )
    return step, {at_one_rate: parts.xreplace(dict.fromkeys(head.rates, rate)), values: sp.MatAdd(*head.values)}
