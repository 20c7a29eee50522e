"""Fine-tuning of the language model on the examples of a prompt, to compare with reading them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from icl_lib.models.absorb import absorb
from icl_lib.paper.hidden_rule.evaluation import ASKED, _draw, replies
from icl_lib.paper.hidden_rule.reading import QUESTION
from icl_lib.paper.hidden_rule.task import RULES, Prompts, Rule


def fine_tuned(model: nn.Module, prompts: Prompts, steps: int, learning_rate: float) -> nn.Module:
    """Copy the model and train the MLPs of the copy with Adam, on the examples of the first prompt as bare questions.

    >>> from icl_lib.paper.hidden_rule import load_hidden_rule, sample_prompts
    >>> model, prompts = load_hidden_rule(), sample_prompts(1, examples=4, seed=0)
    >>> tuned = fine_tuned(model, prompts, steps=20, learning_rate=1e-3)
    >>> bool((replies(tuned, Prompts(prompts.rule.expand(4), prompts.pair[0, :-1, None]).tokens)
    ...       == prompts.numbers[0, :-1]).all())
    True
    """
    tuned = copy.deepcopy(model)
    shown = prompts.pair[0, :-1, None]
    questions = Prompts(prompts.rule[:1].expand(len(shown)), shown, prompts.answers)
    weights = [weight.requires_grad_() for layer in tuned.model.layers for weight in layer.mlp.parameters()]
    optimiser = torch.optim.Adam(weights, learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            cross_entropy(tuned(questions.tokens).logits[:, -1], questions.answer).backward()
            optimiser.step()
    return tuned.requires_grad_(False)


def measure_fine_tuned(
    model: nn.Module, steps: int, learning_rate: float, rules: Sequence[Rule] = RULES, seed: int = 0
) -> float:
    """Measure how often the model is right on 30 new questions of each rule after training on four examples.

    The examples and the questions are those of :func:`~icl_lib.paper.hidden_rule.evaluation.measure_edited`.
    """
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for rule in rules:
        prompts, asked = _draw(rule, generator)
        tuned = fine_tuned(model, prompts, steps, learning_rate)
        right += int((replies(tuned, asked.tokens[:, -QUESTION:]) == asked.answer).sum())
    return right / (ASKED * len(rules))


def gradient_cosines(model: nn.Module, prompts: Prompts, other: Tensor) -> tuple[Tensor, Tensor]:
    r"""The cosines of the edit that replaces the examples with the descent direction of the answer's loss.

    The edit is the joint one of all matrices of a block's MLP. The loss is the cross-entropy of the answer after the
    bare question, and the direction is taken at the unedited weights.

    Args:
        other: ``[count]``: other answers. The cosines with the directions of their losses are the control.

    Returns two tensors ``[count, blocks]``: for the right answers, and for the others.
    """
    model = copy.deepcopy(model)
    cosines: list[list[Tensor]] = [[], []]
    for ids, *answers in zip(prompts.tokens, prompts.answer, other, strict=True):
        patch = absorb(model, ids[None], prompts.context_length, joint=True)
        maps = [
            [(layer.get_submodule(path).weight, edit.dense().flatten()) for path, edit in block.edits.items()]
            for layer, block in zip(model.model.layers, patch.blocks, strict=True)
        ]
        for answer, found in zip(answers, cosines, strict=True):
            weights = [weight.requires_grad_() for block in maps for weight, _ in block]
            with torch.enable_grad():
                loss = cross_entropy(model(**patch.bare(ids[None])).logits[:, -1], answer[None])
            gradients = iter(torch.autograd.grad(loss, weights))
            model.requires_grad_(False)
            by_block = [
                cosine_similarity(
                    torch.cat([edit for _, edit in block]),
                    torch.cat([-next(gradients).flatten() for _ in block]),
                    dim=0,
                )
                for block in maps
            ]
            found.append(torch.stack(by_block))
    right, control = (torch.stack(found) for found in cosines)
    return right, control
