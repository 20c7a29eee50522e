r"""The best possible answers, by enumeration of all rules, without a model.

An ideal solver knows that the rules are equally likely, but not which pairs training holds out. Given the examples $E$,
the rules $f$ that agree with them are equally likely, so for the question $q$

$$P(y \mid E, q) = \frac{\#\{f : f \text{ agrees with } E,\ f(q) = y\}}{\#\{f : f \text{ agrees with } E\}}.$$

The most likely $y$ is the best answer. Without examples, its probability is the chance level.
"""

from __future__ import annotations

from itertools import combinations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from icl_lib.paper.hidden_rule.task import ANSWERS, RULES, VOCABULARY, Prompts


def agreeing(prompts: Prompts) -> Bool[Tensor, "count rules"]:
    """Return which rules agree with all examples of a prompt."""
    shown = prompts.pair[:, :-1]
    return (ANSWERS[:, shown] == prompts.numbers[:, :-1]).all(-1).T


def identified(prompts: Prompts) -> Bool[Tensor, " count"]:
    """Return whether exactly one rule agrees with the examples."""
    return agreeing(prompts).sum(1) == 1


def posterior(prompts: Prompts) -> Float[Tensor, "count numbers"]:
    r"""Return $P(y \mid E, q)$ for every number $y$.

    >>> from icl_lib.paper.hidden_rule.task import sample_prompts
    >>> bare = sample_prompts(count=1000, examples=0, seed=0)
    >>> chance = posterior(bare).amax(1).mean()
    >>> print(f"{chance:.2f}")
    0.08
    """
    agree = agreeing(prompts).double()
    votes = torch.zeros(len(agree), VOCABULARY.numbers, dtype=torch.float64)
    votes.scatter_add_(1, ANSWERS[:, prompts.pair[:, -1]].T, agree)
    return votes / agree.sum(1, keepdim=True)


def best_accuracy(prompts: Prompts) -> float:
    """Return the accuracy of the best answers, averaged over the prompts and the rules that agree with them."""
    return posterior(prompts).amax(1).mean().item()


def ambiguous(examples: int) -> tuple[int, int]:
    """Return how many choices of a rule and a set of examples agree with another rule too, and the number of choices.

    >>> ambiguous(0), ambiguous(1)
    ((30, 30), (1024, 2430))
    """
    if examples not in (0, 1, 2):
        raise ValueError(f"examples is {examples!r}: choose 0, 1 or 2; there are too many sets of more examples.")
    count = 0
    pairs = ANSWERS.shape[1]
    sets = list(combinations(range(pairs), examples))
    for shown in sets:
        answers = ANSWERS[:, shown]
        count += int(((answers[:, None] == answers).all(-1).sum(1) > 1).sum())
    return count, len(RULES) * len(sets)
