"""The same check with every weight edit formed as a matrix, as the papers' own code does: the naive version."""

from __future__ import annotations

import torch
from torch import Tensor

from icl_lib import Transformer
from icl_lib.transformer import Block

LIMIT = 8e9
"""Bytes that the matrices may take."""


def dense_bytes(batch: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """Bytes of one block's matrices: the updates, and the edited weights beside them."""
    return 2 * batch * tokens * 4 * width * width * itemsize


@torch.no_grad()
def verify_dense(model: Transformer, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each block answers when edited and fed the stream of the query alone, and what it answers with the context:
    two ``[batch, n, width]`` a block.

    For pre-norm models with skip connections, the query last. One block at a time, so that one block's matrices are
    all that is held.
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
    # Dividing the vector, not the matrices, saves a third copy of them.
    delta_W = ((g - f) @ W.mT)[..., :, None] * (f / f.square().sum(-1, keepdim=True))[..., None, :]
    delta_b = h - h_0
    edited = (f[..., None, :] @ (W + delta_W).mT).squeeze(-2)  # [batch, n, hidden]
    return h_0 + rest(edited + b) + delta_b, h + block.mlp(g)
