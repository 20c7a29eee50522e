r"""How updates at different positions and in different blocks compare.

The updates of one block and one prompt share their right factor, so two positions differ only in $u_i = W(g_i - f)$.
Across blocks the cosine is a product, $\cos(u^\ell, u^k) \cos(f^\ell, f^k)$. Its first factor pairs the hidden units
of two MLPs by their index, and this index is arbitrary: see :func:`renumbered`. These are Figures A.1, A.2, A.7 and A.8
of Innocenti and Achour (arXiv 2512.11255, version 1).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.blocks.transformer import Transformer
from icl_lib.low_rank import LowRank
from icl_lib.theorem import alignment
from icl_lib.validation import require_instance


def within_block(updates: LowRank) -> Float[Tensor, "*batch positions positions"]:
    r"""Return the alignment of every two positions' updates, $\cos(\Delta W_i, \Delta W_j)$ (Figure A.1).

    ``updates`` is ``[*batch, positions, out, in]``.
    """
    return alignment(updates[..., :, None], updates[..., None, :])


def between_blocks(updates: Sequence[LowRank]) -> Float[Tensor, "*batch blocks blocks"]:
    r"""Return the alignment of every two blocks' updates, $\cos(\Delta W^\ell, \Delta W^k)$ (Figure A.2).

    ``updates`` has one update ``[*batch, out, in]`` for each block, for example those of the last position.
    """
    left, right = (torch.stack([getattr(update, side) for update in updates], dim=-3) for side in ("left", "right"))
    return within_block(LowRank(left, right))


def cosines(vectors: Float[Tensor, "*batch blocks width"]) -> Float[Tensor, "*batch blocks blocks"]:
    """Return the cosine of every two vectors."""
    unit = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def likeness(
    first: Float[Tensor, "*batch positions positions"],
    second: Float[Tensor, "*batch positions positions"],
    fixed: Float[Tensor, "*batch positions positions"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Return the correlation of two tables of alignments, over the entries above their diagonals.

    With a table ``fixed`` it is the partial correlation: of what is left of the two tables when their least-squares
    fits by ``fixed`` are subtracted.

    >>> table = torch.tensor([[1.0, 0.2, -0.5], [0.2, 1.0, 0.9], [-0.5, 0.9, 1.0]])
    >>> round(float(likeness(table, table)), 4), round(float(likeness(table, -table)), 4)
    (1.0, -1.0)
    """
    row, column = torch.triu_indices(first.shape[-1], first.shape[-1], offset=1, device=first.device)
    pairs = torch.stack([first[..., row, column], second[..., row, column]], dim=-2)
    centred = pairs - pairs.mean(-1, keepdim=True)
    if fixed is not None:
        other = fixed[..., row, column]
        other = (other - other.mean(-1, keepdim=True)).unsqueeze(-1)
        centred = centred - (centred @ other) @ other.mT / (other.mT @ other)
    return cosines(centred)[..., 0, 1]


def renumbered(model: Transformer, block: int, order: Tensor) -> Transformer:
    """Return a copy of the model with the units of one block's first hidden layer in another order.

    The copy computes the same function. ``order`` ``[hidden]`` is a permutation: unit ``order[k]`` becomes unit ``k``.
    Derived in :func:`icl_lib.symbolic.hidden_permutation`.

    >>> from icl_lib import TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=3, blocks=2)).double()
    >>> again, sequence = renumbered(model, 1, torch.randperm(12)), torch.randn(5, 3).double()
    >>> torch.allclose(model(sequence), again(sequence), rtol=1e-12)
    True
    """
    require_instance("model", model, Transformer, "give a Transformer.")
    if isinstance(block, bool) or not isinstance(block, int) or not 0 <= block < len(model.blocks):
        raise ValueError(f"block is {block!r}: give a whole number from 0 to {len(model.blocks) - 1}.")
    units = model.blocks[block].mlp[0].out_features
    if not isinstance(order, Tensor) or sorted(order.tolist()) != list(range(units)):
        raise ValueError(
            f"order is not a permutation of the {units} hidden units: give a tensor such as torch.randperm({units})."
        )
    copied = copy.deepcopy(model)
    first, _, second = copied.blocks[block].mlp[:3]
    with torch.no_grad():
        first.weight.copy_(first.weight[order])
        first.bias.copy_(first.bias[order])
        second.weight.copy_(second.weight[:, order])
    return copied
