r"""The papers' small transformer, with the options that their experiments vary."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.block import ContextualBlock
from icl_lib.blocks.contextual import SoftmaxAttention, require_layer_prompt
from icl_lib.blocks.running_average import RunningAverage
from icl_lib.validation import require_float, require_same_kind, require_size


@dataclass(frozen=True)
class TransformerConfig:
    """The shape of a :class:`Transformer`.

    Attributes:
        dim: width of a token as the model receives and returns it.
        width: width of the residual stream; None for ``dim``, without linear maps into and out of the stream.
        blocks: number of blocks.
        heads: attention heads in a block.
        head_dim: width of a head; None for ``width / heads``.
        hidden: width of the MLP's hidden layers; None for four times ``width``.
        hidden_layers: number of hidden layers in an MLP.
        activation: the MLP's nonlinearity, ``gelu`` or ``relu``.
        skip: skip connections around the attention and around the MLP.
        norm: layer norm before each sublayer (``pre``), after it (``post``), or nowhere (``none``).
        causal: whether a token attends only to itself and to the tokens before it.

    Raises `ValueError`, with the name, for a value that is not allowed or a number of heads that does not divide.
    """

    dim: int
    width: int | None = None
    blocks: int = 1
    heads: int = 1
    head_dim: int | None = None
    hidden: int | None = None
    hidden_layers: int = 1
    activation: str = "gelu"
    skip: bool = True
    norm: str = "none"
    causal: bool = True

    def __post_init__(self) -> None:
        for name in ("dim", "width", "blocks", "heads", "head_dim", "hidden", "hidden_layers"):
            if getattr(self, name) is not None or name not in ("width", "head_dim", "hidden"):
                require_size(name, getattr(self, name))
        for name in ("skip", "causal"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give True or False.")
        if self.head_dim is None and self.stream % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width {self.stream}: give head_dim as well.")
        for name, allowed in (("activation", tuple(_ACTIVATIONS)), ("norm", ("none", "pre", "post"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}: choose one of {', '.join(allowed)}.")

    @property
    def stream(self) -> int:
        """The width of the residual stream."""
        return self.width or self.dim


_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}


class Block(nn.Module):
    r"""Attention, then an MLP.

    With layer norm before each and skip connections, $h = t + A(\mathrm{LN}(t))$ and
    $T(t) = h + \mathrm{mlp}(\mathrm{LN}'(h))$.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, hidden = config.stream, config.hidden or 4 * config.stream
        self.config = config
        self.attention = SoftmaxAttention(width, config.heads, config.head_dim)
        sizes = [width] + [hidden] * config.hidden_layers
        inner = [
            layer
            for fan_in, fan_out in itertools.pairwise(sizes)
            for layer in (nn.Linear(fan_in, fan_out), _ACTIVATIONS[config.activation]())
        ]
        self.mlp = nn.Sequential(*inner, nn.Linear(hidden, width))
        with_norm = config.norm != "none"
        self.norm_attention = nn.LayerNorm(width) if with_norm else nn.Identity()
        self.norm_mlp = nn.LayerNorm(width) if with_norm else nn.Identity()

    def forward(self, stream: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch positions width"]:
        """Return the stream after this block.

        If a patch has edits for many positions, the output has all of these positions, also for an input of one token.
        """
        stream = self._sublayer(self._attend, self.norm_attention, stream)
        return self._sublayer(self.mlp, self.norm_mlp, stream)

    def at_query(self, stream: Float[Tensor, "*batch n width"]) -> Float[Tensor, "*batch 1 width"]:
        """Return the last position of :meth:`forward`, and compute only this position."""
        stream = self._sublayer(self._attend_from_query, self.norm_attention, stream)
        return self._sublayer(self.mlp, self.norm_mlp, stream)

    def _attend(self, stream: Tensor) -> Tensor:
        return self.attention.at_every_position(stream, self.config.causal)

    def _attend_from_query(self, stream: Tensor) -> Tensor:
        return self.attention(stream[..., :-1, :], stream[..., -1, :]).unsqueeze(-2)

    def _sublayer(self, layer: Callable[[Tensor], Tensor], norm: nn.Module, stream: Tensor) -> Tensor:
        change = layer(norm(stream) if self.config.norm == "pre" else stream)
        after = stream[..., -change.shape[-2] :, :] + change if self.config.skip else change
        return norm(after) if self.config.norm == "post" else after


class Transformer(nn.Module):
    """A stack of blocks; if ``config.width`` is given, with linear maps into and out of the residual stream.

    There is no positional encoding, since the examples of in-context regression have no order.

    >>> import torch
    >>> model = Transformer(TransformerConfig(dim=3, width=32, heads=8, hidden=128, skip=False))
    >>> model(torch.randn(2, 11, 3)).shape
    torch.Size([2, 11, 3])
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        embedded = config.width is not None
        self.embed = nn.Linear(config.dim, config.stream, bias=False) if embedded else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.blocks))
        self.unembed = nn.Linear(config.stream, config.dim, bias=False) if embedded else nn.Identity()

    def forward(self, sequence: Float[Tensor, "*batch n dim"]) -> Float[Tensor, "*batch n dim"]:
        """Return the model's output at every position."""
        stream = self._embedded(sequence)
        for block in self.blocks:
            stream = block(stream)
        return self.unembed(stream)

    def at_query(self, sequence: Float[Tensor, "*batch n dim"]) -> Float[Tensor, "*batch dim"]:
        """Return the output at the last position; the last block is computed only there.

        >>> import torch
        >>> model, sequence = Transformer(TransformerConfig(dim=4, blocks=2, norm="pre")), torch.randn(7, 4)
        >>> torch.allclose(model.at_query(sequence), model(sequence)[-1], atol=1e-5)
        True
        """
        stream = self._embedded(sequence)
        for block in self.blocks[:-1]:
            stream = block(stream)
        return self.unembed(self.blocks[-1].at_query(stream)).squeeze(-2)

    def _embedded(self, sequence: Tensor) -> Tensor:
        require_float("sequence", sequence, 2, "[*batch, n, dim]")
        require_same_kind("the model", next(self.parameters()), sequence=sequence)
        if sequence.shape[-1] != self.config.dim or sequence.shape[-2] == 0:
            raise ValueError(
                f"sequence has shape {tuple(sequence.shape)}: give [*batch, n, {self.config.dim}] with n ≥ 1."
            )
        return self.embed(sequence)

    def contextual_block(self) -> ContextualBlock:
        r"""Return a model of one block, without skip connections and norms, as $f_\theta(W A(C, x) + b)$.

        $A$ is the embedding and the attention at the last position. $f_\theta$ is the rest of the MLP and the last
        linear map. The parameters are the model's own, not copies.

        Raises `ValueError` for a model of another form, which the theorem for one contextual block does not cover.

        >>> import torch
        >>> model = Transformer(TransformerConfig(dim=3, width=8, heads=2, skip=False))
        >>> sequence = torch.randn(5, 3)
        >>> block = model.contextual_block()
        >>> torch.allclose(block(sequence[:-1], sequence[-1]), model(sequence)[-1], atol=1e-5)
        True
        """
        self.require_contextual_block()
        block = self.blocks[0]
        return ContextualBlock(
            _Embedded(self.embed, block.attention, self.config.dim), nn.Sequential(*block.mlp, self.unembed)
        )

    def require_contextual_block(self) -> None:
        """Raise `ValueError` for a model that is not a single contextual block."""
        config = self.config
        if config.blocks != 1 or config.skip or config.norm != "none":
            raise ValueError(
                f"blocks={config.blocks}, skip={config.skip}, norm={config.norm!r}: only a model with blocks=1, "
                "skip=False and norm='none' is a single contextual block. Build one, or use icl_lib.models.absorb."
            )


class _Embedded(nn.Module):
    """A contextual layer behind an embedding."""

    def __init__(self, embed: nn.Module, layer: nn.Module, dim: int) -> None:
        super().__init__()
        self.embed, self.layer, self.dim = embed, layer, dim

    def forward(self, context: Tensor, query: Tensor) -> Tensor:
        require_layer_prompt(self, context, query)
        return self.layer(self.embed(context), self.embed(query))

    def average(self, context: Tensor, query: Tensor) -> RunningAverage:
        """Return the running average of the layer behind the embedding."""
        require_layer_prompt(self, context, query)
        return self.layer.average(self.embed(context), self.embed(query))
