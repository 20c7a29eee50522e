r"""The weights while a prompt is read: $W_i = W + \Delta W(c_1 \dots c_i)$, token by token.

With $a_i = A(c_1 \dots c_i, x)$, each token takes one step,

$$W_i - W_{i-1} = \frac{W (a_i - a_{i-1})\, a_0^\top}{\lVert a_0 \rVert^2},$$

and each step is a gradient step with the rate $\eta = 1/\lVert a_0\rVert^2$ on a loss that is linear in the weights and
differs from token to token:

$$W_i = W_{i-1} - \eta\, \nabla L_i(W_{i-1}), \qquad L_i(U) = \operatorname{tr}(\Delta_i^\top U), \qquad
  \Delta_i = W (a_{i-1} - a_i)\, a_0^\top .$$

Source: Dherin et al. (arXiv 2507.16003), version 1, Proposition 3.1. Its $L_{i-1}$ is our $L_i$, the loss of token $i$;
its $h$ is our $\eta$. Derived in :func:`icl_lib.symbolic.linear_losses`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.blocks.block import ContextualBlock, require_block_prompt
from icl_lib.dynamics.prefixes import Prefixes, read_prefixes
from icl_lib.low_rank import LowRank
from icl_lib.theorem import weight_update


@dataclass(frozen=True, eq=False)
class Trajectory:
    r"""The weights after each token of a prompt; made by :func:`trajectory`.

    Attributes:
        weight: $W$, ``[out, in]``.
        prefixes: $a_0 \dots a_n$, and the running average that gives them, if there is one.
    """

    weight: Tensor
    prefixes: Prefixes

    @property
    def activations(self) -> Float[Tensor, "*batch steps in_"]:
        r"""What the MLP reads after each token, $a_0, a_1, \dots, a_n$: ``[*batch, n + 1, in]``."""
        return self.prefixes.activations

    @functools.cached_property
    def updates(self) -> LowRank:
        r"""$W_i - W = \Delta W(c_1 \dots c_i)$ for $i = 0 \dots n$: ``[*batch, n + 1, out, in]``.

        Each has rank one, and all share their right factor, so the memory is $O(n)$.
        """
        return weight_update(self.weight, self.activations[..., :1, :], self.activations)

    @property
    def bias_updates(self) -> Tensor:
        r"""$a_i - a_0$ for $i = 0 \dots n$: the edits of the output bias in a block with a skip connection."""
        return self.activations - self.activations[..., :1, :]

    @property
    def increments(self) -> LowRank:
        r"""$W_i - W_{i-1}$ for $i = 1 \dots n$: ``[*batch, n, out, in]``."""
        updates = self.updates
        return LowRank(updates.left.diff(dim=-3), updates.right)

    @property
    def marginal_norms(self) -> Float[Tensor, "*batch n"]:
        r"""$\lVert W_i - W_{i-1} \rVert_F$: the length of each step (Dherin et al., Figure 3)."""
        return self.increments.norm()

    @property
    def step_size(self) -> Float[Tensor, "*batch"]:
        r"""$\eta = 1/\lVert a_0 \rVert^2$, the rate of the linear losses."""
        return 1 / self.activations[..., 0, :].square().sum(-1)

    @property
    def linear_gradients(self) -> LowRank:
        r"""$\Delta_i = W (a_{i-1} - a_i)\, a_0^\top$ for $i = 1 \dots n$: the gradient of $L_i$ at any weights."""
        left = -self.activations.diff(dim=-2) @ self.weight.mT
        return LowRank(left.unsqueeze(-1), self.activations[..., :1, :].unsqueeze(-1))

    def linear_losses(self) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n"]]:
        r"""$L_i(W_{i-1})$ and $L_i(W_i)$: before and after the step of each token.

        The second is smaller by $\lVert W_i - W_{i-1} \rVert_F^2 / \eta$ for any tokens.
        """
        gradients, updates = self.linear_gradients, self.updates
        at_start = (gradients.left * (self.weight @ gradients.right)).sum((-2, -1))
        before, after = (gradients.inner(updates[..., i]) for i in (slice(None, -1), slice(1, None)))
        return at_start + before, at_start + after


def trajectory(
    block: ContextualBlock, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> Trajectory:
    r"""All weights $W_0 = W, W_1, \dots, W_n$ that a block goes through while its query reads one token after another.

    $$T_W(c_1 \dots c_i, x) = T_{W_i}(x), \qquad W_i = W + \frac{W (a_i - a_0)\, a_0^\top}{\lVert a_0 \rVert^2}$$

    (In a block with a skip connection the output bias moves as well, by ``bias_updates``.)
    Source: Dherin et al. (arXiv 2507.16003), version 1, section 3. For a layer with a method ``average`` or
    ``prefixes`` (:mod:`icl_lib.blocks.contextual`) this takes one pass and $O(n)$ memory; for others, one pass for each
    prefix.

    Shapes: ``context`` ``[*batch, n, dim]`` with ``n ≥ 1``, ``query`` ``[*batch, dim]``. The block is left as it was.

    Raises `ValueError` as :func:`icl_lib.blocks.block.implicit_update` does.

    >>> from icl_lib import SoftmaxAttention
    >>> mlp = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    >>> block = ContextualBlock(SoftmaxAttention(dim=4, heads=2), mlp).double()
    >>> path = trajectory(block, torch.randn(50, 4).double(), torch.randn(4).double())
    >>> path.updates, path.marginal_norms.shape
    (LowRank(shape=(51, 16, 4), rank≤1, dtype=torch.float64, device=cpu), torch.Size([50]))
    >>> bool(path.updates[0].norm() == 0)
    True
    """
    require_block_prompt(block, context, query)
    with torch.no_grad():
        found = Trajectory(block.first_linear.weight.detach(), read_prefixes(block, context, query))
        # Raises here, not at the first use of the weights, where a₀ is zero or a number overflows.
        weight_update(found.weight, found.activations[..., 0, :], found.activations[..., -1, :])
    return found
