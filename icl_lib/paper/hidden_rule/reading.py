"""What the edits of some blocks do without those of the others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from icl_lib.low_rank import LowRank
from icl_lib.models.absorb import absorb
from icl_lib.models.patch import Patch
from icl_lib.paper.hidden_rule.task import Prompts

QUESTION = 4
"""The number of tokens of a question, ``2+8=``."""


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
