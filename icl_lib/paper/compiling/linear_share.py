"""How much of what a prompt changes is linear in what the blocks read without it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icl_lib.least_squares import least_squares_edit, share_served
from icl_lib.models.absorb import anatomy_of
from icl_lib.models.activations import reads_of
from icl_lib.models.anatomy import sites
from icl_lib.models.tokens import Tokens, behind_kept
from icl_lib.paper.compiling.baselines import padded

TOGETHER = 8
"""Questions in a pass: all that the maps of all blocks read for the whole prompt is in memory at once."""


def linear_share(
    model: nn.Module, prompt: Tensor, calibration: Sequence[Tensor], held_out: Sequence[Tensor], keep: int
) -> dict[str, list[float]]:
    r"""The share of the prompt's change $\delta = z_C - z_0$ that one matrix serves, block by block.

    The matrix is fitted to the tokens of the calibration questions, and the share ($R^2$,
    :func:`icl_lib.least_squares.share_served`) is that of its own questions (``fitted``), of other questions
    (``held out``), and of these with the changes of other tokens (``shuffled``, the control). No block is edited:
    $z_0$ is what the MLP reads in the unedited model.

    Shapes: ``prompt`` ``[n]``, the questions ``[m_k]``. Each list has one number a block.
    """
    placed = sites(model, anatomy_of(model))

    def read(texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """What the MLPs read for the tokens of the questions, without and behind the prompt, ``[tokens, width]``."""
        parts = [read_together(texts[at : at + TOGETHER]) for at in range(0, len(texts), TOGETHER)]
        return [tuple(map(torch.cat, zip(*block, strict=True))) for block in zip(*parts, strict=True)]

    def read_together(texts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        ids, lengths = padded(texts)
        used = torch.arange(ids.shape[1]) < lengths[:, None]
        positions = torch.tensor([*range(keep), *range(len(prompt), len(prompt) + ids.shape[1])])
        bare = behind_kept(torch.cat([prompt[:keep].expand(len(ids), -1), ids], dim=1), positions)
        whole = {"input_ids": torch.cat([prompt.expand(len(ids), -1), ids], dim=1)}
        found = []
        for call in (bare, whole):
            blocks = reads_of(model, placed, Tokens, [call])
            firsts = [reads[site.anatomy.inner[0]] for site, reads in zip(placed, blocks, strict=True)]
            found.append([one.unflatten(0, (len(ids), -1))[:, -ids.shape[1] :][used] for one in firsts])
        return list(zip(*found, strict=True))

    shares: dict[str, list[float]] = {"fitted": [], "held out": [], "shuffled": []}
    order = torch.Generator().manual_seed(0)
    for (z_0, z_C), (other_0, other_C) in zip(read(calibration), read(held_out), strict=True):
        ridge = z_0.square().sum(-1).median().item()
        edit = least_squares_edit(z_0, z_C - z_0, ridge)
        change = other_C - other_0
        dealt = change[torch.randperm(len(change), generator=order)]
        cases = {"fitted": (z_0, z_C - z_0), "held out": (other_0, change), "shuffled": (other_0, dealt)}
        for name, case in cases.items():
            shares[name].append(round(share_served(edit, *case).item(), 4))
    return shares
