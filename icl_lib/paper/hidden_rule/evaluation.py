"""How often a model is right, and how often it could be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from icl_lib.paper.experiments.language import edited_for_questions
from icl_lib.paper.hidden_rule.reference import best_accuracy, identified
from icl_lib.paper.hidden_rule.task import RULES, Prompts, Rule, sample_prompts
from icl_lib.validation import require_size

QUERIES = ("training", "held out")
BATCH = 250
"""The number of prompts that a model reads at once; it bounds the memory."""
ASKED, SHOWN, MOST_QUESTIONS = 30, 4, 46
"""Of :func:`measure_edited`: questions asked of each rule, examples in front, and the most questions for an edit."""


@torch.no_grad()
def replies(model: nn.Module, ids: Int[Tensor, "count tokens"]) -> Int[Tensor, " count"]:
    """Return the most likely next token after each prompt."""
    return torch.cat([model(part, logits_to_keep=1).logits[:, -1].argmax(-1) for part in ids.split(BATCH)])


def accuracy(model: nn.Module, prompts: Prompts) -> float:
    """Return the share of prompts to which the model gives the right answer."""
    return (replies(model, prompts.tokens) == prompts.answer).double().mean().item()


def measure(model: nn.Module, examples: int, query: str, count: int = 4000, seed: int = 0) -> dict[str, Any]:
    """Measure how often the model is right on fresh prompts.

    Args:
        examples, query, count, seed: as for :func:`~icl_lib.paper.hidden_rule.task.sample_prompts`.

    Returns ``accuracy`` on all ``count`` prompts and the ``best`` accuracy that their examples allow; ``identified``,
    the number of prompts whose examples agree with one rule only; and ``accuracy_identified`` on these, None if there
    are none.
    """
    prompts = sample_prompts(count, examples, seed, query)
    right = replies(model, prompts.tokens) == prompts.answer
    sure = identified(prompts)
    return {
        "examples": examples,
        "query": query,
        "count": count,
        "accuracy": right.double().mean().item(),
        "best": best_accuracy(prompts),
        "identified": int(sure.sum()),
        "accuracy_identified": right[sure].double().mean().item() if sure.any() else None,
    }


def measure_swapped(model: nn.Module, examples: int, count: int = 4000, seed: int = 0) -> dict[str, Any]:
    """Measure which rule the model follows if the examples of every prompt get the answers of another rule.

    The ``count`` prompts returned are those whose new examples agree with one rule only, and for which the two rules
    give different answers. Returns the share of answers that ``follow`` the new rule, and that ``keep`` to the old one.
    """
    prompts = sample_prompts(count, examples, seed)
    shift = torch.randint(1, len(RULES), (count,), generator=torch.Generator().manual_seed(seed))
    other = prompts.by((prompts.rule + shift) % len(RULES))
    judged = identified(other) & (prompts.answer != other.answer)
    answers = replies(model, other.tokens)
    shares = ((answers == wanted)[judged].double().mean().item() for wanted in (other.answer, prompts.answer))
    return {"examples": examples, "count": int(judged.sum()), **dict(zip(("follow", "keep"), shares, strict=True))}


def measure_edited(
    model: nn.Module,
    questions: int,
    rules: Sequence[Rule] = RULES,
    seed: int = 0,
    ridge: float = 1e-2,
    blocks: Collection[int] | None = None,
) -> dict[str, float]:
    """Measure how often the model is right on new questions, without examples, after an edit from some questions.

    For each rule, four examples and 30 other questions are drawn. The edit is made from ``questions`` more, with the
    examples in front (:func:`~icl_lib.paper.experiments.edited_for_questions`). No question that is asked, and no
    mirror image of one (8+2 for 2+8), is among the examples or among those for the edit.

    Args:
        questions: the number of questions for an edit, 0 to 46; 0 leaves the model as it is.
        ridge, blocks: of the edit.

    Returns shares, averaged over the rules: ``right``, of answers by the rule; ``other``, the same after the edit for
    the next rule; ``agree``, of answers equal to those of the model with the examples; ``prompted``, of its right
    answers; ``fitted``, of right answers to the questions of the edit itself (of those that were left out, without
    an edit).
    """
    require_size("questions", questions, 0)
    if questions > MOST_QUESTIONS:
        raise ValueError(
            f"questions is {questions}, but only {MOST_QUESTIONS} are left for fitting the edit: give at most "
            f"{MOST_QUESTIONS}."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [_draw(rule, generator) for rule in rules]
    edits = [
        edited_for_questions(model, prompts.tokens[0, :-4], prompts.tokens[:questions, -4:], ridge, blocks)
        for prompts, _ in (drawn if questions else ())
    ] or [model] * len(drawn)
    found: dict[str, list[Tensor]] = {"right": [], "other": [], "agree": [], "prompted": [], "fitted": []}
    for index, (fitted, asked) in enumerate(drawn):
        alone, prompted = asked.tokens[:, -4:], replies(model, asked.tokens)
        answers, others = replies(edits[index], alone), replies(edits[index + 1 - len(edits)], alone)
        for name, agree in (
            ("right", answers == asked.answer),
            ("other", others == asked.answer),
            ("agree", answers == prompted),
            ("prompted", prompted == asked.answer),
            ("fitted", (replies(edits[index], fitted.tokens[:, -4:]) == fitted.answer)[: questions or None]),
        ):
            found[name].append(agree)
    return {name: torch.cat(agree).double().mean().item() for name, agree in found.items()}


def _draw(rule: Rule, generator: torch.Generator) -> tuple[Prompts, Prompts]:
    """Prompts with the same examples: those for the edit, and those that are asked."""
    height = torch.rand(9, 9, generator=generator)
    order = (height + height.mT).flatten().argsort()  # a pair and its mirror image are neighbours
    asked, rest = order[:ASKED], order[ASKED:]
    rest = rest[~torch.isin(rest % 9 * 9 + rest // 9, asked)]
    rest = rest[torch.randperm(len(rest), generator=generator)]
    shown, others = rest[:SHOWN], rest[SHOWN:]

    def after_examples(queries: Tensor) -> Prompts:
        pair = torch.cat([shown.expand(len(queries), -1), queries[:, None]], dim=1)
        return Prompts(torch.full((len(queries),), RULES.index(rule)), pair)

    return after_examples(others), after_examples(asked)
