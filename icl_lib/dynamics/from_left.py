r"""A prompt eaten from the left: the first token is removed from the prompt and an edit replaces it, then the second.

With $r_i = A(c_{i+1} \dots c_n, x)$, which the MLP reads once $i$ tokens are removed,

$$P_0 = W, \qquad P_i = P_{i-1} + \frac{P_{i-1} (r_{i-1} - r_i)\, r_i^\top}{\lVert r_i \rVert^2}, \qquad
  P_i\, r_i = W A(C, x) .$$

With the weights $P_i$ and the rest of the prompt, the block outputs what the original block outputs for the whole
prompt. Each token adds at most one to the rank of $P_i - W$; the updates of :func:`icl_lib.dynamics.trajectory` have
rank one throughout. With a skip connection, $r_0 - r_i$ is added to the output bias.

Source: Dherin et al. (arXiv 2507.16003), version 1, appendix B; in version 4 Proposition 2.6 and, for the product
(``EatenFromLeft.factors``), Corollary C.3. We know the numbers of version 4 second-hand. Derived in
:func:`icl_lib.symbolic.eaten_from_left`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.blocks.block import ContextualBlock, require_block_prompt
from icl_lib.dynamics.prefixes import read_suffixes
from icl_lib.low_rank import LowRank
from icl_lib.theorem import weight_update


@dataclass(frozen=True, eq=False)
class EatenFromLeft:
    r"""The weights after each removed token; made by :func:`eaten_from_left`.

    Attributes:
        steps: all steps side by side, ``[*batch, out, in]``: one rank-one term for each token.
        suffixes: $r_0, r_1, \dots, r_n$, which the MLP reads from what is left: ``[*batch, n + 1, in]``.
    """

    steps: LowRank
    suffixes: Tensor

    def after(self, tokens: int) -> LowRank:
        """$P_i - W$ after ``tokens`` removed tokens: ``[*batch, out, in]``, of rank at most ``tokens``."""
        return self.steps.first(tokens)

    def bias_after(self, tokens: int) -> Tensor:
        r"""$r_0 - r_i$, the edit of the output bias in a block with a skip connection: ``[*batch, in]``."""
        return self.suffixes[..., 0, :] - self.suffixes[..., tokens, :]

    @property
    def factors(self) -> LowRank:
        r"""$h_i A_i$ for $i = 1 \dots n$, with $P_n = W (I + h_1 A_1) (I + h_2 A_2) \cdots (I + h_n A_n)$.

        $$h_i = \frac{1}{\lVert r_i \rVert^2}, \qquad A_i = (r_{i-1} - r_i)\, r_i^\top$$

        They do not contain $W$. Each factor maps $r_i$ to $r_{i-1}$. Shape ``[*batch, n, in, in]``, of rank at most
        one. Source: Dherin et al. (arXiv 2507.16003), version 4, Corollary C.3 (its number second-hand).

        >>> from icl_lib import MeanPooling
        >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(2, 1, bias=False))
        >>> eaten = eaten_from_left(block, torch.tensor([[3.0, 0.0]]), torch.tensor([1.0, 0.0]))
        >>> eaten.factors[0].dense()  # r_0 = [2, 0] and r_1 = [1, 0]
        tensor([[1., 0.],
                [0., 0.]])
        """
        before, after = self.suffixes[..., :-1, :], self.suffixes[..., 1:, :]
        lengths = torch.linalg.vector_norm(after, dim=-1, keepdim=True)
        return LowRank(((before - after) / lengths).unsqueeze(-1), (after / lengths).unsqueeze(-1))

    @property
    def marginal_norms(self) -> Float[Tensor, "*batch n"]:
        r"""$\lVert P_i - P_{i-1} \rVert_F$ for $i = 1 \dots n$."""
        return self.steps.left.norm(dim=-2) * self.steps.right.norm(dim=-2)


def eaten_from_left(
    block: ContextualBlock, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> EatenFromLeft:
    r"""The weights $P_1, \dots, P_n$ that replace the first tokens of a context, one after another from the left.

    Source and formula: see :mod:`icl_lib.dynamics.from_left`. Each step depends on all earlier ones, so the memory is
    $O(n^2)$.

    Shapes: ``context`` ``[*batch, n, dim]`` with ``n ≥ 1``, ``query`` ``[*batch, dim]``.

    Raises `ValueError` as :func:`icl_lib.blocks.block.implicit_update` does, and where some $r_i$ is zero.

    >>> from icl_lib import SoftmaxAttention
    >>> block = ContextualBlock(SoftmaxAttention(dim=4), torch.nn.Linear(4, 16)).double()
    >>> eaten = eaten_from_left(block, torch.randn(9, 4).double(), torch.randn(4).double())
    >>> [int(eaten.after(tokens).rank()) for tokens in range(10)]
    [0, 1, 2, 3, 4, 4, 4, 4, 4, 4]
    """
    require_block_prompt(block, context, query)
    with torch.no_grad():
        weight = block.first_linear.weight.detach()
        suffixes = read_suffixes(block, context, query)
        before, after = suffixes[..., :-1, :], suffixes[..., 1:, :]
        # The steps as if each were taken from W; the right factors are the unit vectors r_i/‖r_i‖.
        alone = weight_update(weight, after, before)
        right = alone.right.squeeze(-1).mT  # [*batch, in, n]
        # Step i is taken from P_{i−1}, which contains the terms of the steps k < i. With unit right factors e_k,
        # u_i = u_i(alone) + Σ_{k<i} u_k (e_k · (r_{i−1} − r_i)) / ‖r_i‖: a triangular system.
        lengths = torch.linalg.vector_norm(after, dim=-1)
        seen = right.mT @ ((before - after) / lengths.unsqueeze(-1)).mT
        system = torch.eye(seen.shape[-1], dtype=seen.dtype, device=seen.device) - seen.triu(diagonal=1)
        left = torch.linalg.solve_triangular(
            system, alone.left.squeeze(-1).mT, upper=True, left=False, unitriangular=True
        )
        return EatenFromLeft(LowRank(left, right), suffixes)
