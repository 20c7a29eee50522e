r"""For linear attention a prompt is one matrix, and one edit of the weights replaces it for every query.

In unnormalised linear attention the query enters once, linearly:

$$A(C, q) = q + S_C\, q, \qquad S_C = P \sum_i W_V c_i \, (W_K c_i)^\top W_Q .$$

So a block $f_\theta(W A(C, q) + b)$ with the weights $W + W S_C$ outputs for every bare query what it outputs with the
prompt. Source: Dherin et al. (arXiv 2507.16003), version 4, Example 2.5; Chen et al., *Exact conversion of in-context
learning to model weights in linearized-attention transformers* (arXiv 2406.02847), who put $S_C$ into biases of the
attention.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.block import ContextualBlock, require_block
from icl_lib.blocks.contextual import require_layer_prompt
from icl_lib.constructions.gradient_descent import LinearSelfAttention
from icl_lib.low_rank import LowRank
from icl_lib.validation import require_float, require_instance


def context_matrix(layer: LinearSelfAttention, context: Float[Tensor, "*batch n dim"]) -> LowRank:
    r"""The matrix that a context is for linear attention, $S_C$ with $A(C, q) = q + S_C\, q$ for every query $q$.

    $$S_C = P \sum_{i=1}^{n} W_V c_i \, (W_Q^\top W_K c_i)^\top$$

    Source: Dherin et al. (arXiv 2507.16003), version 4, Example 2.5. (With ``mean=True`` it is divided by $n + 1$.)

    Shapes: ``context`` ``[*batch, n, dim]``; the result is ``[*batch, dim, dim]`` and has one term for each token.
    Raises `ValueError` for a layer of another kind, or a context of another width, dtype or device.

    >>> layer, context = LinearSelfAttention(dim=3).double(), torch.randn(5, 3).double()
    >>> query = torch.randn(3).double()
    >>> torch.allclose(query + context_matrix(layer, context) @ query, layer(context, query), rtol=1e-12)
    True
    """
    require_instance("layer", layer, LinearSelfAttention, "give a LinearSelfAttention: no other layer has the matrix.")
    require_float("context", context, 2, "[*batch, n, dim]")
    require_layer_prompt(layer, context, context.new_zeros(*context.shape[:-2], context.shape[-1]))
    with torch.no_grad():
        read, written = layer.key(context) @ layer.query.weight, layer.output(layer.value(context))
        return LowRank(written.mT / (context.shape[-2] + 1 if layer.mean else 1), read.mT)


def query_independent_update(block: ContextualBlock, context: Float[Tensor, "*batch n dim"]) -> LowRank:
    r"""The one edit of a block's first linear map that replaces a context for every query.

    $$\Delta W = W S_C, \qquad T_{W + \Delta W}(q) = T_W(C, q) \quad \text{for every } q .$$

    :func:`icl_lib.theorem.weight_update` gives for one query $q$ the part of it that this query sees,
    $W S_C\, q q^\top / \lVert q \rVert^2$.

    Source: Dherin et al. (arXiv 2507.16003), version 4, Example 2.5. Derived in
    :func:`icl_lib.symbolic.query_independent_update`.

    Shapes: ``context`` ``[*batch, n, dim]``; the result is ``[*batch, out, dim]``, with one term for each token.
    Raises `ValueError` for a block with a skip connection or with another contextual layer than
    :class:`~icl_lib.constructions.gradient_descent.LinearSelfAttention`, and as :func:`context_matrix`.

    >>> block = ContextualBlock(LinearSelfAttention(dim=3), nn.Linear(3, 4)).double()
    >>> context, queries = torch.randn(5, 3).double(), torch.randn(9, 3).double()
    >>> edited = block.first_linear.weight + query_independent_update(block, context).dense()
    >>> wanted = block(context.expand(9, 5, 3), queries)
    >>> torch.allclose(queries @ edited.mT + block.first_linear.bias, wanted, rtol=1e-12)
    True
    """
    require_block(block)
    if block.skip:
        raise ValueError("block has skip=True: its output bias would need an edit for each query. Use skip=False.")
    matrix = context_matrix(block.contextual, context)
    with torch.no_grad():
        return LowRank(block.first_linear.weight @ matrix.left, matrix.right)


class InterpolatedAttention(nn.Module):
    r"""Between linear attention (``mix=0``) and softmax attention (``mix=1``), with the weights of one linear layer.

    $$A(C, q) = q + P \sum_i w_i\, W_V c_i, \qquad
      w_i = (1 - \mu)\, s_i + \mu\, n \operatorname{softmax}_i(s), \qquad s_i = (W_K c_i)^\top W_Q q$$

    The softmax is taken over the context and multiplied by its length $n$: for small scores it is $1 + s_i$ minus the
    mean score, so both ends have the same scale.

    Shapes and errors are those of :class:`~icl_lib.constructions.gradient_descent.LinearSelfAttention`; also
    `ValueError` for a ``mix`` outside 0 … 1, and for a layer with ``mean=True``.

    >>> layer = LinearSelfAttention(dim=3)
    >>> context, query = torch.randn(5, 3), torch.randn(3)
    >>> torch.allclose(InterpolatedAttention(layer, mix=0.0)(context, query), layer(context, query), atol=1e-6)
    True
    """

    def __init__(self, layer: LinearSelfAttention, mix: float) -> None:
        super().__init__()
        require_instance("layer", layer, LinearSelfAttention, "give a LinearSelfAttention.")
        if layer.mean:
            raise ValueError("layer has mean=True: give a layer that adds over its context, with mean=False.")
        if isinstance(mix, bool) or not isinstance(mix, int | float) or not 0 <= mix <= 1:
            raise ValueError(f"mix is {mix!r}: give a number from 0 (linear) to 1 (softmax).")
        self.layer, self.mix, self.dim = layer, mix, layer.dim

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The query token after the layer."""
        require_layer_prompt(self, context, query)
        layer = self.layer
        scores = (layer.key(context) @ layer.query(query).unsqueeze(-1)).squeeze(-1)
        weights = (1 - self.mix) * scores + self.mix * context.shape[-2] * scores.softmax(-1)
        return query + layer.output((weights.unsqueeze(-2) @ layer.value(context)).squeeze(-2))
