r"""Eating a prompt from the left: weights that take in the first token, then the second, and lose it from the prompt.

With $s_i = A(c_{i+1} \dots c_n, x)$, what is read once $i$ tokens are gone,

$$P_0 = W, \qquad P_{i+1} = P_i + \frac{P_i (s_i - s_{i+1})\, s_{i+1}^\top}{\lVert s_{i+1} \rVert^2}, \qquad
  P_i\, s_i = W A(C, x) .$$

After each token the block with the weights $P_i$, reading what is left of the prompt, answers as it answered to all of
it. The rank of $P_i - W$ grows by one with each token, up to the size of $W$, while :func:`icl_lib.dynamics.trajectory`
stays at rank one: another path between the same answers. With a skip connection the output bias takes
$s_0 - s_i$ besides.

Source: Dherin et al. (arXiv 2507.16003), Appendix B.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.block import ContextualBlock, check_block_prompt
from icl_lib.dynamics.prefixes import read_suffixes
from icl_lib.low_rank import LowRank
from icl_lib.theorem import weight_update
from icl_lib.validation import validated_by


@dataclass(frozen=True, eq=False)
class EatenFromLeft:
    r"""The weights after each token that is eaten; made by :func:`eaten_from_left`.

    Attributes:
        steps: all steps side by side, ``[*batch, out, in]``: one rank-one term for each token.
        suffixes: $s_0, s_1, \dots, s_n$: ``[*batch, n + 1, in]``.
    """

    steps: LowRank
    suffixes: Tensor

    def after(self, tokens: int) -> LowRank:
        """$P_i - W$ once ``tokens`` tokens are eaten: ``[*batch, out, in]``, of rank at most ``tokens``."""
        return self.steps.first(tokens)

    def bias_after(self, tokens: int) -> Tensor:
        r"""$s_0 - s_i$: what the output bias of a block with a skip connection takes by then, ``[*batch, in]``."""
        return self.suffixes[..., 0, :] - self.suffixes[..., tokens, :]

    @property
    def marginal_norms(self) -> Float[Tensor, "*batch n"]:
        r"""$\lVert P_{i+1} - P_i \rVert_F$, token by token."""
        return self.steps.left.norm(dim=-2) * self.steps.right.norm(dim=-2)


@validated_by(check_block_prompt)
def eaten_from_left(
    block: ContextualBlock, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> EatenFromLeft:
    r"""The weights $P_1, \dots, P_n$ of a block that takes in its context token by token, from the left.

    Source and formula: see :mod:`icl_lib.dynamics.from_left`. Each step needs all that came before, so this takes
    $O(n^2)$ numbers.

    Shapes: ``context`` ``[*batch, n, dim]`` with ``n ≥ 1``, ``query`` ``[*batch, dim]``.

    Raises `ValueError` as :func:`icl_lib.block.implicit_update` does, and where what is read from some suffix is zero.

    >>> from icl_lib import SoftmaxAttention
    >>> block = ContextualBlock(SoftmaxAttention(dim=4), torch.nn.Linear(4, 16)).double()
    >>> eaten = eaten_from_left(block, torch.randn(9, 4).double(), torch.randn(4).double())
    >>> [int(eaten.after(tokens).rank()) for tokens in range(10)]
    [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    """
    with torch.no_grad():
        weight = block.first_linear.weight.detach()
        suffixes = read_suffixes(block, context, query)
        before, after = suffixes[..., :-1, :], suffixes[..., 1:, :]
        # What the steps would be if each were taken from W; its right factors are the unit vectors s/‖s‖.
        alone = weight_update(weight, after, before)
        right = alone.right.squeeze(-1).mT  # [*batch, in, n]
        # Step j is taken from P_j: it also sees the terms of the steps k < j. Their sizes follow from one another,
        # u_j = u_j(alone) + Σ_{k<j} u_k (r_k · (s_j − s_{j+1})) / ‖s_{j+1}‖, a triangular system.
        lengths = torch.linalg.vector_norm(after, dim=-1)
        seen = right.mT @ ((before - after) / lengths.unsqueeze(-1)).mT
        system = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device) - seen.triu(diagonal=1)
        left = torch.linalg.solve_triangular(
            system, alone.left.squeeze(-1).mT, upper=True, left=False, unitriangular=True
        )
        return EatenFromLeft(LowRank(left, right), suffixes)
