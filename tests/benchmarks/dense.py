"""A verification that forms every weight edit as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from icl_lib import Transformer
from icl_lib.blocks.transformer import Block

LIMIT = 8e9
"""The largest size of the matrices in bytes."""


def dense_bytes(batch: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """Return the bytes of one block's matrices: the updates and the edited weights."""
    return 2 * batch * tokens * 4 * width * width * itemsize


@torch.no_grad()
def verify_dense(model: Transformer, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return, for each block, its edited output for the query's stream alone and its output with the context.

    Both are ``[batch, n, width]``. For pre-norm models with skip connections; the query is the last token. It treats
    one block at a time, so that only one block's matrices are in memory.
    """
    stream, pairs = inputs, []
    for block in model.blocks:
        patched, stream = _block(block, stream)
        pairs.append((patched, stream))
    return pairs


def _block(block: Block, stream: Tensor) -> tuple[Tensor, Tensor]:
    x = stream[:, -1:]
    h, h_0 = (t + block.attention.at_every_position(block.norm_attention(t), block.config.causal) for t in (stream, x))
    g, f = block.norm_mlp(h), block.norm_mlp(h_0)
    W, b = block.mlp[0].weight, block.mlp[0].bias
    rest = block.mlp[1:]
    # Dividing the vector and not the matrices avoids a third copy of them.
    delta_W = ((g - f) @ W.mT)[..., :, None] * (f / f.square().sum(-1, keepdim=True))[..., None, :]
    delta_b = h - h_0
    edited = (f[..., None, :] @ (W + delta_W).mT).squeeze(-2)  # [batch, n, hidden]
    return h_0 + rest(edited + b) + delta_b, h + block.mlp(g)
