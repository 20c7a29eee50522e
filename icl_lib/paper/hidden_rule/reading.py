r"""How the blocks of a language model read a prompt: example by example, and with the edits of some blocks only."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.low_rank import LowRank
from icl_lib.models.absorb import absorb
from icl_lib.models.patch import Patch
from icl_lib.paper.hidden_rule.task import Prompts

QUESTION, EXAMPLE = 4, 6
"""The number of tokens of a question, ``2+8=``, and of an example with its comma, ``2+3=10,``."""


@dataclass(frozen=True, eq=False)
class ReadByExample:
    r"""Measurements after each example, at the last token of the query; made by :func:`read_by_example`.

    Attributes:
        steps: $\lVert W_i - W_{i-1} \rVert_F$ of the gate map in every block, ``[count, examples, blocks]``.
        newest: the attention to the newest example, ``[count, examples, blocks, heads]``.
        read: the attention to all examples so far, of the same shape.
        effective: how many examples a head reads, $1/\sum_j p_j^2$ for the shares $p_j$ of the examples in its
            attention to examples, of the same shape.
    """

    steps: Float[Tensor, "count examples blocks"]
    newest: Float[Tensor, "count examples blocks heads"]
    read: Float[Tensor, "count examples blocks heads"]
    effective: Float[Tensor, "count examples blocks heads"]


@torch.no_grad()
def read_by_example(model: nn.Module, prompts: Prompts) -> ReadByExample:
    """Follow the edits and the attention of a language model while a prompt grows by one example at a time.

    The edit after $i$ examples replaces these examples for the query, as :func:`icl_lib.models.absorb.absorb` computes
    it. In the blocks after the first, the vector that the edit divides by changes with the examples too.

    >>> from icl_lib.paper.hidden_rule import load_hidden_rule, sample_prompts
    >>> found = read_by_example(load_hidden_rule(dtype=torch.float64), sample_prompts(2, examples=3, seed=0))
    >>> found.steps.shape, found.newest.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3, 4, 4]))
    """
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")  # only this implementation returns what it attends to
    steps: list[Tensor] = []
    attention: list[Tensor] = []
    before: list[LowRank] | None = None
    for examples in range(1, prompts.pair.shape[1]):
        length = EXAMPLE * examples
        ids = torch.cat([prompts.tokens[:, :length], prompts.tokens[:, -QUESTION:]], dim=1)
        edits = [next(iter(block.inner.values()))[:, -1] for block in absorb(model, ids, length).blocks]
        moved = edits if before is None else [new - old for new, old in zip(edits, before, strict=True)]
        steps.append(torch.stack([step.norm() for step in moved], dim=-1))
        weights = torch.stack(eager(ids, output_attentions=True).attentions, dim=1)[..., -1, :length]
        by_example = weights.unflatten(-1, (examples, EXAMPLE)).sum(-1)
        total = by_example.sum(-1)
        effective = total.square() / by_example.square().sum(-1)
        attention.append(torch.stack([by_example[..., -1], total, effective]))
        before = edits
    return ReadByExample(torch.stack(steps, dim=1), *torch.stack(attention, dim=2))


def of_blocks(patch: Patch, kept: Collection[int]) -> Patch:
    """The patch with the edits of some blocks only, numbered from 0; those of the others are zero."""

    def zeroed(edits: dict[str, LowRank | Tensor], keep: bool) -> dict[str, LowRank | Tensor]:
        return {path: edit if keep else 0 * edit for path, edit in edits.items()}

    blocks = (
        replace(block, inner=zeroed(block.inner, index in kept), outer=zeroed(block.outer, index in kept))
        for index, block in enumerate(patch.blocks)
    )
    return replace(patch, blocks=tuple(blocks))


@torch.no_grad()
def measure_cascade(
    model: nn.Module, prompts: Prompts, other: Prompts, kept: Sequence[Collection[int]]
) -> list[dict[str, float]]:
    """Measure how often the model answers rightly without the examples, with the edits of some blocks only.

    The edits are those that, all together, replace the examples exactly.

    Args:
        other: the same questions after other examples; their edits are the control.
        kept: the blocks whose edits are applied, one collection for each row.

    Returns for each row the shares of right answers with the edits (``right``) and with those of the other examples
    (``other``).
    """
    patches = {
        name: absorb(model, one.tokens, one.context_length) for name, one in (("right", prompts), ("other", other))
    }
    rows = []
    for blocks in kept:
        row = {}
        for name, patch in patches.items():
            part = of_blocks(patch, blocks)
            with part.applied(model):
                said = model(**part.bare(prompts.tokens)).logits[:, -1].argmax(-1)
            row[name] = (said == prompts.answer).double().mean().item()
        rows.append(row)
    return rows
