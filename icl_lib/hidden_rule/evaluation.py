"""How often a model is right, beside how often it can be."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from icl_lib.hidden_rule.reference import best_accuracy, identified
from icl_lib.hidden_rule.task import RULES, Prompts, sample_prompts

QUERIES = ("training", "held out")


@torch.no_grad()
def replies(model: nn.Module, ids: Int[Tensor, "count tokens"]) -> Int[Tensor, " count"]:
    """The most likely next token after each prompt."""
    return model(ids, logits_to_keep=1).logits[:, -1].argmax(-1)


def accuracy(model: nn.Module, prompts: Prompts) -> float:
    """The share of prompts that the model answers right."""
    return (replies(model, prompts.tokens) == prompts.answer).double().mean().item()


def measure(model: nn.Module, examples: int, query: str, count: int = 4000, seed: int = 0) -> dict[str, Any]:
    """How often the model is right on fresh prompts.

    Args:
        examples, query, count, seed: as for :func:`~icl_lib.hidden_rule.task.sample_prompts`.

    Returns ``accuracy`` on all ``count`` prompts and the ``best`` that their examples allow; ``identified``, how many
    prompts leave one rule only, and ``accuracy_identified`` on these, None without any.
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
    """Whose rule the model follows after every prompt's examples were given another rule's answers.

    Returns, of the ``count`` prompts that identify the other rule and to which the two rules answer differently, the
    shares that ``follow`` the examples now shown and that ``keep`` to the rule they stand no longer for.
    """
    prompts = sample_prompts(count, examples, seed)
    shift = torch.randint(1, len(RULES), (count,), generator=torch.Generator().manual_seed(seed))
    other = prompts.by((prompts.rule + shift) % len(RULES))
    judged = identified(other) & (prompts.answer != other.answer)
    answers = replies(model, other.tokens)
    shares = ((answers == wanted)[judged].double().mean().item() for wanted in (other.answer, prompts.answer))
    return {"examples": examples, "count": int(judged.sum()), **dict(zip(("follow", "keep"), shares, strict=True))}
