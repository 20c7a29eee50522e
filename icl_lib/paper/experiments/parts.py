"""What training changed: parts of a trained network put back as they were, and the matrices of attention heads."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.transformer import Transformer


@torch.no_grad()
def with_initial(trained: nn.Module, initial: nn.Module, parts: Collection[str]) -> nn.Module:
    """Copy a trained network and put some of its parts back to their weights before training.

    >>> from icl_lib.paper.experiments.one_block import ONE_BLOCK
    >>> trained, initial = Transformer(ONE_BLOCK), Transformer(ONE_BLOCK)
    >>> mixed = with_initial(trained, initial, ["value"])
    >>> torch.equal(mixed.blocks[0].attention.value.weight, initial.blocks[0].attention.value.weight)
    True

    Args:
        initial: a network of the same shape.
        parts: names of modules; a parameter is put back if one of them is a part of its path.

    Raises `ValueError` for a name that is no part of any path.
    """
    mixed, before = copy.deepcopy(trained), dict(initial.named_parameters())
    missing = set(parts) - {name for path in before for name in path.split(".")}
    if missing:
        raise ValueError(
            f"parts holds {min(missing)!r}, which is in no path of a parameter, such as {next(iter(before))}."
        )
    for path, weight in mixed.named_parameters():
        if set(parts) & set(path.split(".")):
            weight.copy_(before[path])
    return mixed


@torch.no_grad()
def head_matrices(model: Transformer) -> tuple[Float[Tensor, "heads width dim"], Float[Tensor, "heads dim dim"]]:
    r"""What each head of the first block does, in the coordinates of the tokens as the model receives them.

    With the embedding $E$, a head attends with the scores $e_j^\top M e_q$, $M = E^\top W_K^\top W_Q E / \sqrt{d}$ ($d$
    the width of a head), and writes $W_O W_V E\, e_j$. Returns $W_O W_V E$ and $M$ of each head.

    >>> from icl_lib.paper.experiments.one_block import ONE_BLOCK
    >>> writes, scores = head_matrices(Transformer(ONE_BLOCK))
    >>> writes.shape, scores.shape
    (torch.Size([8, 32, 3]), torch.Size([8, 3, 3]))
    """
    attention = model.blocks[0].attention
    embed = model.embed.weight if isinstance(model.embed, nn.Linear) else torch.eye(model.config.dim)
    heads, size = attention.heads, attention.head_dim
    query, key, value = (
        (layer.weight @ embed).unflatten(0, (heads, size))
        for layer in (attention.query, attention.key, attention.value)
    )
    output = attention.output.weight.unflatten(1, (heads, size)).movedim(1, 0)
    return output @ value, key.mT @ query / size**0.5
