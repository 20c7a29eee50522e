"""Other ways to move a prompt into the language model: fine-tuning, distillation and steering, beside reading it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy

from icl_lib.models.absorb import absorb
from icl_lib.paper.hidden_rule.evaluation import ASKED, MOST_QUESTIONS, SHOWN, _draw, replies
from icl_lib.paper.hidden_rule.reading import QUESTION
from icl_lib.paper.hidden_rule.task import RULES, Prompts, Rule


def fine_tuned(
    model: nn.Module, questions: Int[Tensor, "m length"], answers: Int[Tensor, " m"], steps: int, learning_rate: float
) -> nn.Module:
    """Copy the model and train the MLPs of the copy with Adam, on bare questions and their answers.

    >>> from icl_lib.paper.hidden_rule import VOCABULARY, load_hidden_rule
    >>> question = VOCABULARY.encode("2+8=")[None]
    >>> tuned = fine_tuned(load_hidden_rule(), question, torch.tensor([20]), steps=20, learning_rate=1e-3)
    >>> replies(tuned, question)
    tensor([20])
    """
    tuned = copy.deepcopy(model)
    weights = [weight.requires_grad_() for layer in tuned.model.layers for weight in layer.mlp.parameters()]
    optimiser = torch.optim.Adam(weights, learning_rate)
    with torch.enable_grad():
        for _ in range(steps):
            optimiser.zero_grad()
            cross_entropy(tuned(questions).logits[:, -1], answers).backward()
            optimiser.step()
    return tuned.requires_grad_(False)


def measure_fine_tuned(
    model: nn.Module,
    steps: int,
    learning_rate: float,
    rules: Sequence[Rule] = RULES,
    distilled: bool = False,
    seed: int = 0,
) -> float:
    """Measure how often the model is right on 30 new questions of each rule after some training.

    Examples and questions are those of :func:`~icl_lib.paper.hidden_rule.evaluation.measure_edited`.

    Args:
        distilled: train on 46 further questions, with the model's own answers to them after the four examples, instead
            of the four examples themselves. This is a form of context distillation.
    """
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for rule in rules:
        prompts, asked = _draw(rule, generator)
        if distilled:
            after_examples = prompts.tokens[:MOST_QUESTIONS]
            questions, answers = after_examples[:, -QUESTION:], replies(model, after_examples)
        else:
            shown = Prompts(prompts.rule[:SHOWN], prompts.pair[0, :-1, None])
            questions, answers = shown.tokens, shown.answer
        tuned = fine_tuned(model, questions, answers, steps, learning_rate)
        right += int((replies(tuned, asked.tokens[:, -QUESTION:]) == asked.answer).sum())
    return right / (ASKED * len(rules))


@torch.no_grad()
def measure_steered(
    model: nn.Module, block: int, questions: int = MOST_QUESTIONS, rules: Sequence[Rule] = RULES, seed: int = 0
) -> float:
    """Measure how often the model is right on 30 new questions of each rule if a vector is added to its stream.

    The vector is the mean change that the four examples make to the output of a block, at each token of some other
    questions. Examples and questions are those of :func:`~icl_lib.paper.hidden_rule.evaluation.measure_edited`.

    Args:
        block: the block, numbered from 0.
        questions: the number of questions for the mean, 1 to 46.
    """
    generator = torch.Generator().manual_seed(seed)
    layer, right = model.model.layers[block], 0
    for rule in rules:
        prompts, asked = _draw(rule, generator)
        tokens = prompts.tokens[:questions]
        with_examples, alone = (_outputs(model, layer, ids) for ids in (tokens, tokens[:, -QUESTION:]))
        steered = (with_examples - alone).mean(0)
        hook = layer.register_forward_hook(lambda _, __, output, steered=steered: output + steered)
        try:
            right += int((replies(model, asked.tokens[:, -QUESTION:]) == asked.answer).sum())
        finally:
            hook.remove()
    return right / (ASKED * len(rules))


def _outputs(model: nn.Module, layer: nn.Module, ids: Tensor) -> Float[Tensor, "count tokens width"]:
    """The output of a block at the tokens of the question."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output[:, -QUESTION:]))
    try:
        model(ids)
    finally:
        hook.remove()
    return seen[0]


def gradient_cosines(
    model: nn.Module, prompts: Prompts, other: Int[Tensor, " count"]
) -> tuple[Float[Tensor, "count blocks"], Float[Tensor, "count blocks"]]:
    r"""The cosines of the edit that replaces the examples with the descent direction of the answer's loss.

    The edit is the joint one of all matrices of a block's MLP. The loss is the cross-entropy of the answer after the
    bare question, and the direction is taken at the unedited weights.

    Args:
        other: other answers. The cosines with the directions of their losses are the control.

    Returns the cosines for the right answers, and those for the others.
    """
    model = copy.deepcopy(model)
    cosines: list[list[Tensor]] = [[], []]
    for ids, *answers in zip(prompts.tokens, prompts.answer, other, strict=True):
        patch = absorb(model, ids[None], prompts.context_length, joint=True)
        maps = [
            [(layer.get_submodule(path).weight, edit.dense().flatten()) for path, edit in block.edits.items()]
            for layer, block in zip(model.model.layers, patch.blocks, strict=True)
        ]
        weights = [weight.requires_grad_() for block in maps for weight, _ in block]
        for answer, found in zip(answers, cosines, strict=True):
            with torch.enable_grad():
                loss = cross_entropy(model(**patch.bare(ids[None])).logits[:, -1], answer[None])
            gradients = iter(torch.autograd.grad(loss, weights))
            by_block = [
                cosine_similarity(
                    torch.cat([edit for _, edit in block]),
                    torch.cat([-next(gradients).flatten() for _ in block]),
                    dim=0,
                )
                for block in maps
            ]
            found.append(torch.stack(by_block))
        model.requires_grad_(False)
    right, control = (torch.stack(found) for found in cosines)
    return right, control
