"""Rules that training never shows: does the model find them, or does it choose among those it knows?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.paper.hidden_rule.evaluation import replies
from icl_lib.paper.hidden_rule.task import ANSWERS, PAIRS, Prompts, Rule
from icl_lib.validation import require_size


def sample_of_rules(rules: Sequence[Rule], count: int, examples: int, seed: int) -> Prompts:
    """Draw prompts of any rules: a rule, and pairs without repetition, with equal probabilities.

    A pair is drawn only if its answer is a number that some rule of training gives, so that no token is new.

    >>> prompts = sample_of_rules([Rule("max(a,b)", 2)], count=2, examples=3, seed=0)
    >>> prompts.tokens.shape, bool((prompts.answer == PAIRS[prompts.pair[:, -1]].amax(-1) + 2).all())
    (torch.Size([2, 22]), True)
    """
    require_size("count", count)
    require_size("examples", examples, 0)
    answers = torch.stack([rule(*PAIRS.T) for rule in rules])
    generator = torch.Generator().manual_seed(seed)
    rule = torch.randint(len(rules), (count,), generator=generator)
    known = torch.isin(answers, ANSWERS)
    fewest = int(known.sum(1).min()) - 1
    if examples > fewest:
        raise ValueError(f"examples is {examples}, but there are pairs for {fewest} examples and a query only.")
    drawn = torch.rand(count, len(PAIRS), generator=generator).masked_fill(~known[rule], -1)
    return Prompts(rule, drawn.topk(examples + 1).indices, answers)


def nearest_answers(prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The answers ``[count, rules]`` of all rules of training to the queries, and which rules are nearest.

    The nearest rules have the least sum of distances to the answers of the examples.
    """
    shown = prompts.pair[:, :-1]
    distance = (ANSWERS[:, shown] - prompts.numbers[:, :-1]).abs().sum(-1).T
    return ANSWERS[:, prompts.pair[:, -1]].T, distance == distance.amin(1, keepdim=True)


def measure_rules(
    model: nn.Module, rules: Sequence[Rule], examples: int, count: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Measure how often the model is right on prompts of some rules, and what it answers instead.

    Returns ``accuracy``; ``nearest``, the share of answers that a nearest rule of training gives
    (:func:`nearest_answers`); ``distance``, the mean distance of the answers from the right ones; ``chance``, the
    accuracy of the best fixed guess for each question.
    """
    prompts = sample_of_rules(rules, count, examples, seed)
    said = replies(model, prompts.tokens)
    given, near = nearest_answers(prompts)
    by_question = prompts.answers.T.tolist()
    guess = [max(answers.count(one) for one in answers) / len(answers) for answers in by_question]
    return {
        "examples": examples,
        "count": count,
        "accuracy": (said == prompts.answer).double().mean().item(),
        "nearest": ((given == said[:, None]) & near).any(1).double().mean().item(),
        "distance": (said - prompts.answer).abs().double().mean().item(),
        "chance": torch.tensor(guess)[prompts.pair[:, -1]].mean().item(),
    }
