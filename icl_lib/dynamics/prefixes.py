"""The activations that a query reads from every prefix or suffix of its context, in one pass where possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from icl_lib.blocks.block import ContextualBlock
from icl_lib.blocks.running_average import RunningAverage


@dataclass(frozen=True, eq=False)
class Prefixes:
    r"""The activations that the MLP reads while the context grows.

    Attributes:
        activations: $a_0, a_1, \dots, a_n$ with $a_i = A(c_1 \dots c_i, x)$: ``[*batch, n + 1, in]``.
        average: the running average that gives them, or None.
        why_not: a sentence that says why there is none; empty where there is one.
    """

    activations: Tensor
    average: RunningAverage | None
    why_not: str = ""


def read_prefixes(block: ContextualBlock, context: Tensor, query: Tensor) -> Prefixes:
    r"""$A(c_1 \dots c_i, x)$ for every $i$ from 0 to $n$.

    One pass where the layer has a method ``average`` or ``prefixes`` (:mod:`icl_lib.blocks.contextual`) whose results
    agree with the layer's own for no token, one token, half of them and all; otherwise one pass for each prefix.
    """
    layer, n = block.contextual, context.shape[-2]

    def own(tokens: int) -> Tensor:
        return block.read(context[..., :tokens, :], query)

    if not hasattr(layer, "average"):
        why_not = f"the contextual layer, a {type(layer).__name__}, has no method `average`"
    else:
        average = layer.average(context, query)
        activations = average.read(average.heads())
        differs = _differs(activations, own, n)
        if differs is None:
            return Prefixes(activations, average)
        why_not = (
            f"the contextual layer, a {type(layer).__name__}, differs from the average that its method `average` "
            f"describes, after {differs} tokens. Do positions shift when a token is appended?"
        )
    if hasattr(layer, "prefixes"):
        activations = layer.prefixes(context, query)
        if _differs(activations, own, n) is None:
            return Prefixes(activations, None, why_not)
    return Prefixes(torch.stack([own(tokens) for tokens in range(n + 1)], dim=-2), None, why_not)


def read_suffixes(block: ContextualBlock, context: Tensor, query: Tensor) -> Tensor:
    r"""$A(c_{i+1} \dots c_n, x)$ for every $i$ from 0 to $n$: ``[*batch, n + 1, in]``.

    An average does not depend on the order of its tokens, so its suffixes are the prefixes of the reversed context.
    """
    layer, n = block.contextual, context.shape[-2]

    def own(tokens: int) -> Tensor:
        return block.read(context[..., n - tokens :, :], query)

    if hasattr(layer, "average"):
        average = layer.average(context.flip(-2), query)
        activations = average.read(average.heads())
        if _differs(activations, own, n) is None:
            return activations.flip(-2)
    return torch.stack([own(tokens) for tokens in range(n, -1, -1)], dim=-2)


def _differs(activations: Tensor, own: Callable[[int], Tensor], n: int) -> int | None:
    """The first number of tokens, of none, one, half and all, for which ``activations`` differ from the layer's own."""
    # Sums in another order differ in the last digits; a layer of another kind differs in far more than half of them.
    tolerance = torch.finfo(activations.dtype).eps ** 0.5
    for tokens in dict.fromkeys((0, 1, n // 2, n)):
        read = own(tokens)
        distance = torch.linalg.vector_norm(activations[..., tokens, :] - read, dim=-1)
        if not bool((distance <= tolerance * torch.linalg.vector_norm(read, dim=-1)).all()):
            return tokens
    return None
