"""The same check with every weight edit formed as a matrix, as the papers' own code does: the naive version."""

from __future__ import annotations

import torch
from torch import Tensor

from icl_lib import Transformer

LIMIT = 8e9
"""Bytes that the matrices may take."""


def dense_bytes(batch: int, tokens: int, width: int, itemsize: int = 4) -> int:
    """Bytes of one block's matrices: the updates, and the edited weights beside them."""
    return 2 * batch * tokens * 4 * width * width * itemsize


@torch.no_grad()
def verify_dense(model: Transformer, inputs: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each block's answers from the stream of the query alone, with edited weights, and its own answers: two
    ``[batch, n, width]`` a block.

    For pre-norm models with skip connections, the query last. One block at a time, so that one block's matrices are
    all that is held; the attention's answers are used twice rather than computed twice.
    """
    stream, pairs = inputs, []
    for block in model.blocks:
        read_from, causal, mlp = block.attention.at_every_position, model.config.causal, block.mlp
        x = stream[:, -1:]
        h = stream + read_from(block.norm_attention(stream), causal)
        h_0 = x + read_from(block.norm_attention(x), causal)
        g, f = block.norm_mlp(h), block.norm_mlp(h_0)
        W, b = mlp[0].weight, mlp[0].bias
        numerator = (g - f) @ W.mT
        denominator = f.square().sum(-1, keepdim=True)
        delta_W = numerator[..., :, None] * (f / denominator)[..., None, :]  # [batch, n, hidden, width]
        edited = W + delta_W
        pre_activation = (edited @ f[..., None]).squeeze(-1) + b
        patched = h_0 + mlp[1:](pre_activation) + (h - h_0)
        stream = h + mlp(g)
        pairs.append((patched, stream))
    return pairs
