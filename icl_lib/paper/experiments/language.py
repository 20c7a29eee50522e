"""Edits of a language model made from many questions, and without the examples before them."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_lib.least_squares import least_squares_edit
from icl_lib.paper.experiments.architectures import LANGUAGE_MODELS, VOCABULARY, small_language_model

__all__ = ["LANGUAGE_MODELS", "VOCABULARY", "edited_for_questions", "small_language_model"]


@torch.no_grad()
def edited_for_questions(
    model: nn.Module,
    examples: Int[Tensor, " n"],
    questions: Int[Tensor, "m length"],
    ridge: float = 1e-2,
    blocks: Collection[int] | None = None,
) -> nn.Module:
    r"""Copy a Llama and edit its MLPs so that, on these questions alone, it computes about what it does after examples.

    Block by block, with the tokens of all questions as columns, the edits are

    $$\Delta V = V (Z_C - Z_0)\, Z_0^\top (Z_0 Z_0^\top + \mu s_Z I)^{-1}, \qquad
      \Delta W_\text{down} = \Delta H\, Y^\top (Y Y^\top + \mu s_Y I)^{-1},$$

    where $s_Z$ and $s_Y$ are the mean eigenvalues of $Z_0 Z_0^\top$ and $Y Y^\top$. As $\mu \to 0$ they become those
    of :func:`icl_lib.theorem.joint_weight_update` if the columns of $Z_0$ and $Y$ are linearly independent, and
    least-squares fits otherwise. $Z_0$ and $Y$ are read in the copy, whose earlier blocks are edited already. No
    gradients are taken.

    Args:
        examples: the token ids that precede every question, and that the edits replace.
        questions: token ids, one question a row.
        ridge: the strength of the ridge, $\mu$.
        blocks: the blocks to edit, numbered from 0; by default all. Each is fitted to the stream that reaches it.
    """
    rows, length = questions.shape
    with_examples = torch.cat([examples.expand(rows, -1), questions], dim=1)
    alone = {"input_ids": questions, "position_ids": torch.arange(length).expand(rows, -1) + len(examples)}
    edited = copy.deepcopy(model)
    streams, reads = _mlp_inputs(model, length, input_ids=with_examples)
    for block, layer in enumerate(edited.model.layers):
        if blocks is not None and block not in blocks:
            continue
        mlp, (stream, read) = layer.mlp, (part[block] for part in _mlp_inputs(edited, length, **alone))
        for inner in (mlp.gate_proj, mlp.up_proj):
            inner.weight += _ridge_edit(read, (reads[block] - read) @ inner.weight.mT, ridge)
        hidden = mlp.act_fn(mlp.gate_proj(read)) * mlp.up_proj(read)
        mlp.down_proj.weight += _ridge_edit(hidden, streams[block] - stream, ridge)
    return edited


def _mlp_inputs(model: nn.Module, length: int, **call: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The input and the output of each block's norm before the MLP, ``[tokens, width]``, at the last positions."""
    streams, reads = [], []

    def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        for kept, tokens in ((streams, args[0]), (reads, output)):
            kept.append(tokens[:, -length:].flatten(0, 1))

    hooks = [layer.post_attention_layernorm.register_forward_hook(note) for layer in model.model.layers]
    try:
        model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return streams, reads


def _ridge_edit(reads: Float[Tensor, "m in_"], changes: Float[Tensor, "m out"], ridge: float) -> Tensor:
    """The matrix ``[out, in]`` that maps reads to changes, by ridge regression."""
    return least_squares_edit(reads, changes, ridge * reads.square().sum().item() / reads.shape[-1]).dense()
