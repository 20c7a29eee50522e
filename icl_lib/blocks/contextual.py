r"""Contextual layers $A(C, x)$: maps from a context $C$ and a query $x$ to a vector.

Source: Dherin et al. (arXiv 2507.16003), version 1, Section 2. The theorem only needs a layer that returns a vector
with the context and without it, so any module ``layer(context, query)`` can be used. Here are four examples.

Shapes: ``context`` is ``[*batch, n, dim]`` with ``n ≥ 0``, ``query`` is ``[*batch, dim]``, the result is
``[*batch, out]``. An empty context is ``context[..., :0, :]`` and gives $A(x)$.

Two optional methods make it cheap to read a context that grows token by token. ``average(context, query)`` is for
layers that take an average over tokens. ``prefixes(context, query)`` is for layers with a state and returns the outputs
after $0, 1, \dots, n$ tokens, ``[*batch, n + 1, out]``. :mod:`icl_lib.dynamics` checks both against the layer.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.running_average import RunningAverage
from icl_lib.validation import require_float, require_same_kind, require_size


def require_prompt(context: Tensor, query: Tensor) -> None:
    """Raise a `ValueError` unless the context and the query match; see the shapes above."""
    require_float("context", context, 2, "[*batch, n, dim]")
    require_float("query", query, 1, "[*batch, dim]")
    require_same_kind("context", context, query=query)
    if (*context.shape[:-2], context.shape[-1]) != tuple(query.shape):
        raise ValueError(
            f"context has shape {tuple(context.shape)} and query {tuple(query.shape)}: give a context [*batch, n, dim] "
            "and a query [*batch, dim]. An empty context is context[..., :0, :]."
        )


def require_layer_prompt(layer: nn.Module, context: Tensor, query: Tensor) -> None:
    """Raise a `ValueError` unless the prompt has the width ``layer.dim`` and the dtype and device of the layer."""
    require_prompt(context, query)
    if layer.dim is not None and query.shape[-1] != layer.dim:
        raise ValueError(
            f"query has {query.shape[-1]} features and this layer reads {layer.dim}: give a prompt of this width."
        )
    for parameter in layer.parameters():
        require_same_kind("the layer", parameter, query=query)
        break


def tokens(
    context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch n+1 dim"]:
    """The sequence ``(c_1 … c_n, x)``, with the query last."""
    return torch.cat([context, query.unsqueeze(-2)], dim=-2)


class _MultiHead(nn.Module):
    """The four projections of an attention layer and the split into heads."""

    def __init__(self, dim: int, heads: int = 1, head_dim: int | None = None) -> None:
        super().__init__()
        require_size("dim", dim)
        require_size("heads", heads)
        if head_dim is None and dim % heads:
            raise ValueError(f"dim={dim} is not a multiple of heads={heads}: give head_dim as well.")
        head_dim = dim // heads if head_dim is None else head_dim
        require_size("head_dim", head_dim)
        self.dim, self.heads, self.head_dim = dim, heads, head_dim
        width = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(dim, width, bias=False) for _ in range(3))
        self.output = nn.Linear(width, dim, bias=False)

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return projection(x).unflatten(-1, (self.heads, self.head_dim))  # [*batch, n, heads, head_dim]

    def _scored(self, context: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """By head: the keys and values of all tokens, those of the query last, and the query vector."""
        sequence = tokens(context, query)
        return self._heads(self.key, sequence), self._heads(self.value, sequence), self._heads(self.query, query)


class SoftmaxAttention(_MultiHead):
    r"""Multi-head softmax attention.

    $$A(C, x) = \sum_h W_O^h \sum_i \alpha_i^h\, W_V^h t_i, \qquad
      \alpha^h = \operatorname{softmax}_i\bigl(\langle W_K^h t_i, W_Q^h x\rangle / \sqrt{d_h}\bigr),$$

    over the tokens $t = (c_1 \dots c_n, x)$. Without a context the softmax has one score, so $A(x) = W_O W_V x$; see
    :func:`icl_lib.symbolic.single_token_attention`.

    >>> layer = SoftmaxAttention(dim=4, heads=2).double()
    >>> context, query = torch.randn(3, 7, 4).double(), torch.randn(3, 4).double()
    >>> layer(context, query).shape
    torch.Size([3, 4])
    >>> torch.allclose(layer(context[:, :0], query), layer.output(layer.value(query)))
    True
    """

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The output at the query."""
        require_layer_prompt(self, context, query)
        return self._attend(query.unsqueeze(-2), tokens(context, query), causal=False).squeeze(-2)

    def at_every_position(
        self, sequence: Float[Tensor, "*batch n dim"], causal: bool = True
    ) -> Float[Tensor, "*batch n dim"]:
        """Self-attention, the output at each token; if ``causal``, a token's context is the tokens before it.

        >>> layer, sequence = SoftmaxAttention(dim=4, heads=2).double(), torch.randn(5, 4).double()
        >>> torch.allclose(layer.at_every_position(sequence)[2], layer(sequence[:2], sequence[2]))
        True
        """
        return self._attend(sequence, sequence, causal)

    def _attend(self, queries: Tensor, keys: Tensor, causal: bool) -> Tensor:
        q, k, v = (
            self._heads(projection, x).transpose(-3, -2)  # [*batch, heads, n, head_dim]
            for projection, x in ((self.query, queries), (self.key, keys), (self.value, keys))
        )
        read = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.output(read.transpose(-3, -2).flatten(-2))

    def average(self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]) -> RunningAverage:
        r"""The running average over the tokens; $\alpha_i$ is the attention weight of $c_i$ among $c_1 \dots c_i, x$.

        >>> layer = SoftmaxAttention(dim=4).double()
        >>> context, query = torch.randn(7, 4).double(), torch.randn(4).double()
        >>> average = layer.average(context, query)
        >>> torch.allclose(average.read(average.heads())[3], layer(context[:3], query))
        True
        """
        require_layer_prompt(self, context, query)
        keys, values, asked = self._scored(context, query)
        scores = torch.einsum("...nhd,...hd->...nh", keys, asked) / math.sqrt(self.head_dim)
        sequence = torch.cat([scores[..., -1:, :], scores[..., :-1, :]], dim=-2)  # the average starts with the query
        totals = torch.logcumsumexp(sequence, dim=-2)
        rates = torch.exp(sequence - totals)[..., 1:, :]
        return RunningAverage(rates, values[..., :-1, :, :], values[..., -1, :, :], self.output.weight)


class LinearAttention(_MultiHead):
    r"""Multi-head linear attention, without softmax: a plain average over the tokens $t = (c_1 \dots c_n, x)$.

    $$A(C, x) = \sum_h W_O^h \, \tfrac{1}{n+1} \sum_i (W_V^h t_i)\, \langle W_K^h t_i, W_Q^h x\rangle .$$

    >>> LinearAttention(dim=4, heads=2)(torch.randn(7, 4), torch.randn(4)).shape
    torch.Size([4])
    """

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The output at the query."""
        require_layer_prompt(self, context, query)
        return self.output(self._weighted(context, query).mean(dim=-3).flatten(-2))

    def _weighted(self, context: Tensor, query: Tensor) -> Tensor:
        """The value of each token times its score, that of the query last."""
        keys, values, asked = self._scored(context, query)
        return torch.einsum("...nhd,...hd->...nh", keys, asked).unsqueeze(-1) * values

    def average(self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]) -> RunningAverage:
        r"""The running average over values times scores: $\alpha_i = 1/(i + 1)$."""
        require_layer_prompt(self, context, query)
        weighted = self._weighted(context, query)
        values, start = weighted[..., :-1, :, :], weighted[..., -1, :, :]
        return RunningAverage(_uniform_rates(values), values, start, self.output.weight)


class GRU(nn.Module):
    """A gated recurrent unit that reads the context and then the query; the result is its last state.

    >>> GRU(dim=4, hidden=6)(torch.randn(3, 7, 4), torch.randn(3, 4)).shape
    torch.Size([3, 6])
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        require_size("dim", dim)
        require_size("hidden", hidden)
        self.dim = dim
        self.cell = nn.GRU(dim, hidden, batch_first=True)

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch hidden"]:
        """The state after the context and the query."""
        require_layer_prompt(self, context, query)
        sequence = tokens(context, query)
        flat = sequence.reshape(math.prod(query.shape[:-1]), *sequence.shape[-2:])  # nn.GRU takes one batch dimension
        _, state = self.cell(flat)
        return state[0].reshape(*query.shape[:-1], state.shape[-1])

    def prefixes(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch n+1 hidden"]:
        """The states after the query for the first 0, 1, …, n tokens of the context.

        >>> layer, context, query = GRU(dim=4, hidden=6), torch.randn(7, 4), torch.randn(4)
        >>> torch.allclose(layer.prefixes(context, query)[3], layer(context[:3], query), atol=1e-6)
        True
        """
        require_layer_prompt(self, context, query)
        batch, n = query.shape[:-1], context.shape[-2]
        states = query.new_zeros(*batch, n + 1, self.cell.hidden_size)
        if n:
            flat = context.reshape(math.prod(batch), *context.shape[-2:])
            states[..., 1:, :] = self.cell(flat)[0].reshape(*batch, n, -1)
        asked = query.unsqueeze(-2).expand(*batch, n + 1, -1).reshape(-1, 1, query.shape[-1])
        _, state = self.cell(asked, states.reshape(1, asked.shape[0], -1))
        return state[0].reshape(*batch, n + 1, -1)


class MeanPooling(nn.Module):
    r"""The mean of all tokens, $A(C, x) = (c_1 + \dots + c_n + x)/(n+1)$: a contextual layer without parameters.

    >>> MeanPooling()(torch.tensor([[1.0, 1.0], [3.0, 3.0]]), torch.tensor([2.0, 5.0]))
    tensor([2., 3.])
    """

    dim = None  # reads any width

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The mean over the context and the query."""
        require_layer_prompt(self, context, query)
        return tokens(context, query).mean(dim=-2)

    def average(self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]) -> RunningAverage:
        r"""The running average over the tokens: $\alpha_i = 1/(i + 1)$."""
        require_layer_prompt(self, context, query)
        values = context.unsqueeze(-2)
        return RunningAverage(_uniform_rates(values), values, query.unsqueeze(-2))


def _uniform_rates(values: Float[Tensor, "*batch n heads head_dim"]) -> Float[Tensor, "*batch n heads"]:
    """The rates of a plain average that starts with the query."""
    count = torch.arange(2, values.shape[-3] + 2, dtype=values.dtype, device=values.device)
    return (1 / count).unsqueeze(-1).expand(values.shape[:-1])
