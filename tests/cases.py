"""Tensors, blocks and models that several tests draw, and how far two results are apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icl_lib import ContextualBlock, Transformer, TransformerConfig
from icl_lib.measures import relative_error


def normal(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Tensors of normal numbers, the same in every precision up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def prompt(
    n: int = 5, dim: int = 6, batch: tuple[int, ...] = (), seed: int | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """A context ``[*batch, n, dim]`` and a query ``[*batch, dim]``; another seed for another length by itself."""
    (sequence,) = normal((*batch, n + 1, dim), seed=n if seed is None else seed, dtype=dtype)
    return sequence[..., :-1, :], sequence[..., -1, :]


def block_of(layer: nn.Module, dim: int = 6, skip: bool = False) -> ContextualBlock:
    """A contextual layer with an MLP of one hidden layer, in float64."""
    mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
    return ContextualBlock(layer, mlp, skip).double()


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a vector, 0 for an empty batch."""
    errors = relative_error(actual, expected)
    return errors.max().item() if errors.numel() else 0.0


def lively(**config: Any) -> Transformer:
    """A model whose LayerNorms hide nothing, and in which signals neither fade nor explode with depth."""
    model = Transformer(TransformerConfig(**{"dim": 8, "blocks": 3, "heads": 2, "hidden_layers": 2, **config})).double()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.3)
        else:  # GELU halves a variance; with skips and no norm each block adds to the stream
            gain = 0.5 if model.config.skip and model.config.norm == "none" else 1.4 if "mlp" in name else 1.0
            nn.init.normal_(parameter, std=gain * parameter.shape[-1] ** -0.5)
    return model
