r"""Contextual layers that take an average over tokens, while the context grows.

Softmax attention, linear attention and mean pooling are such layers. When token $c_i$ is appended, the average
$\bar v_i^h$ of each head moves a fraction of the way towards the value of this token:

$$\bar v_i^h = \bar v_{i-1}^h + \alpha_i^h\,(v_i^h - \bar v_{i-1}^h), \qquad
  a_i = \sum_h W_O^h\, \bar v_i^h = A(c_1 \dots c_i, x).$$

(Here $v_i^h$ is the value before $W_O^h$. The book's $v_i^h$ and $a_i^h$ are $W_O^h v_i^h$ and $W_O^h \bar v_i^h$.)

For softmax attention the rate $\alpha_i$ is the attention weight of $c_i$ among $c_1 \dots c_i, x$; for a plain average
it is $1/(i + 1)$. Derived in :func:`icl_lib.symbolic.running_average`. The recursion holds if a new token changes
neither the query nor the earlier keys and values; positions counted from the end violate this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RunningAverage:
    r"""The averages of all heads while a context grows.

    Attributes:
        rates: $\alpha_i^h$, ``[*batch, n, heads]``.
        values: $v_i^h$, the value of token $i$ in head $h$, ``[*batch, n, heads, head_dim]``.
        start: $\bar v_0^h$, the value of the query, ``[*batch, heads, head_dim]``.
        output: $W_O$, the output map, ``[out, heads * head_dim]``; None if there is one head and no output map.

    >>> average = RunningAverage(
    ...     rates=torch.tensor([[1 / 2], [1 / 3]]),
    ...     values=torch.tensor([[[4.0]], [[7.0]]]),
    ...     start=torch.tensor([[1.0]]),
    ... )
    >>> average.read(average.heads())  # the mean of 1; of 1, 4; of 1, 4, 7
    tensor([[1.0000],
            [2.5000],
            [4.0000]])
    """

    rates: Tensor
    values: Tensor
    start: Tensor
    output: Tensor | None = None

    def heads(self) -> Float[Tensor, "*batch steps heads head_dim"]:
        """The averages of all heads after 0, 1, …, n tokens, in one pass over the tokens."""
        return running_average(self.rates, self.values, self.start)

    def read(self, heads: Float[Tensor, "*some heads head_dim"]) -> Float[Tensor, "*some out"]:
        """The layer's output for these averages of its heads."""
        together = heads.flatten(-2)
        return together if self.output is None else together @ self.output.mT

    def read_each(self, heads: Float[Tensor, "*some heads head_dim"]) -> Float[Tensor, "*some heads out"]:
        """The share of each head in the layer's output."""
        if self.output is None:
            return heads
        by_head = self.output.unflatten(-1, heads.shape[-2:])
        return torch.einsum("...hd,ohd->...ho", heads, by_head)

    def __getitem__(self, index: Any) -> RunningAverage:
        """Index the leading dimensions."""
        return RunningAverage(self.rates[index], self.values[index], self.start[index], self.output)


def running_average(
    rates: Float[Tensor, "*batch n heads"],
    values: Float[Tensor, "*batch n heads head_dim"],
    start: Float[Tensor, "*batch heads head_dim"],
) -> Float[Tensor, "*batch n+1 heads head_dim"]:
    r"""All of $\bar v_i = (1 - \alpha_i)\, \bar v_{i-1} + \alpha_i v_i$, from $\bar v_0$ to $\bar v_n$.

    Two steps in a row have the form of one step. So pairs of steps are joined, then pairs of pairs, in $\log_2 n$
    rounds over all tokens at once. No sum of exponentials is formed, which could overflow.

    >>> rates = torch.tensor([[0.5], [0.5], [0.5]])
    >>> running_average(rates, torch.ones(3, 1, 1), torch.zeros(1, 1)).flatten()
    tensor([0.0000, 0.5000, 0.7500, 0.8750])
    """
    moved = rates.unsqueeze(-1) * values
    kept = (1 - rates).unsqueeze(-1)
    reach, n = 1, rates.shape[-2]
    while reach < n:
        earlier, later = slice(None, -reach), slice(reach, None)
        joined = moved[..., later, :, :] + kept[..., later, :, :] * moved[..., earlier, :, :]
        both = kept[..., later, :, :] * kept[..., earlier, :, :]
        moved = torch.cat([moved[..., :reach, :, :], joined], dim=-3)
        kept = torch.cat([kept[..., :reach, :, :], both], dim=-3)
        reach *= 2
    start = start.unsqueeze(-3)
    return torch.cat([start, moved + kept * start], dim=-3)
