r"""The gradient of the task's loss at the weights $W_i$, to compare with the steps of reading.

With $z = U a + b$, the gradient with respect to the first linear map has rank one: $\nabla \ell(U) = (\partial \ell /
\partial z)\, a^\top$. Autograd gives $\partial \ell / \partial z$ at every token of every prompt in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.blocks.block import ContextualBlock, require_block
from icl_lib.dynamics.path import Trajectory
from icl_lib.low_rank import LowRank
from icl_lib.theorem import alignment
from icl_lib.validation import require_broadcastable, require_float, require_instance, require_same_kind

Loss = Callable[[Tensor], Tensor]


def answers(
    block: ContextualBlock, updates: LowRank, query: Float[Tensor, "*batch dim"], bias: Tensor | None = None
) -> Float[Tensor, "*answers out"]:
    r"""The outputs of a block on the bare query with the weights $W +$ ``updates``, kept as factors.

    The block runs without a context, and the MLP's first linear map computes $W a + b + L (R^\top a)$.

    Shapes: ``updates`` ``[*batch, out, in]``, ``query`` ``[*batch, dim]``; leading dimensions broadcast. In a block
    with a skip connection, ``bias`` ``[*batch, dim]`` is added to the output bias; a trajectory has it as
    ``bias_updates``.

    >>> from icl_lib import MeanPooling
    >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(2, 2))
    >>> query, none = torch.randn(2), LowRank(torch.zeros(5, 2, 1), torch.zeros(2, 1))
    >>> torch.equal(answers(block, none, query)[3], block(query[None][:0], query))
    True
    """
    with torch.no_grad():
        return _run(block, updates, query, bias)[0]


def _run(block: ContextualBlock, updates: LowRank, query: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the input of the first linear map and its output, at which gradients are taken."""
    require_block(block)
    require_instance("updates", updates, LowRank, "give a LowRank, such as trajectory(…).updates.")
    require_float("query", query, 1, "[*batch, dim]")
    require_same_kind("block's weight", block.first_linear.weight, updates=updates, query=query)
    batch = require_broadcastable(updates=updates.batch_shape, query=query.shape[:-1])
    if bias is not None:
        if not block.skip:
            raise ValueError("bias is given, but the block has no skip connection: leave it out.")
        require_float("bias", bias, 1, "[*batch, dim]")
        require_broadcastable(updates=updates.batch_shape, bias=bias.shape[:-1])
    query = query.expand(*batch, -1)
    read = block.read(query.unsqueeze(-2)[..., :0, :], query).detach()
    answered: list[Tensor] = []

    def edit(_: Any, __: Any, answer: Tensor) -> Tensor:
        answered.append(updates.addmv(answer, read).detach().requires_grad_())
        return answered[0]

    # The contextual layer may use the same map, so the hook stands only while the MLP runs.
    hook = block.first_linear.register_forward_hook(edit)
    try:
        output = block.mlp(read)
    finally:
        hook.remove()
    if block.skip:
        output = query + read + output + (0 if bias is None else bias)
    return output, read, answered[0]


def task_gradients(
    block: ContextualBlock,
    updates: LowRank,
    query: Float[Tensor, "*batch dim"],
    loss: Loss,
    bias: Tensor | None = None,
) -> LowRank:
    r"""The gradient of a loss with respect to the first linear map, at the weights $W + $ ``updates``, without context.

    Args:
        block: runs on the bare query with each of the edited weights; it is not changed.
        updates: ``[*batch, out, in]``, such as the ``updates`` of a trajectory.
        query: ``[*batch, dim]``; leading dimensions broadcast with those of ``updates``.
        loss: takes the block's outputs ``[*batch, out]`` to losses ``[*batch]``.
        bias: as for :func:`answers`.

    Returns $\nabla \ell(W + \text{updates})$, ``[*batch, out, in]``, of rank one.

    >>> from icl_lib import MeanPooling
    >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(2, 1, bias=False))
    >>> none = LowRank(torch.zeros(1, 1), torch.zeros(2, 1))
    >>> task_gradients(block, none, torch.tensor([1.0, 3.0]), lambda output: output[..., 0]).dense()
    tensor([[1., 3.]])
    """
    if not callable(loss):
        raise ValueError(
            f"loss is a {type(loss).__name__}: give a function that takes the block's outputs and returns one number "
            "for each query."
        )
    with torch.enable_grad():
        output, read, answer = _run(block, updates, query, bias)
        (slope,) = torch.autograd.grad(loss(output).sum(), answer)
    return LowRank(slope.unsqueeze(-1), read.unsqueeze(-1))


def step_alignment(path: Trajectory, block: ContextualBlock, query: Tensor, loss: Loss) -> Float[Tensor, "*batch n"]:
    r"""The cosine of each token's step with the descent direction of the task's loss at the weights before the step.

    $$\cos\bigl(W_i - W_{i-1},\; -\nabla \ell(W_{i-1})\bigr), \qquad \ell(U) = \text{loss}(T_U(x)), \qquad
      i = 1 \dots n$$

    It is 1 where reading the token is a gradient step on the task's loss, and 0 where the two are orthogonal. The right
    factor of a step is $a_0(x)^\top$, and that of a gradient is $a_0(x')^\top$ for the query $x'$ of its loss, so the
    cosine is at most $\lvert\cos(a_0(x), a_0(x'))\rvert$.

    Args:
        path: the trajectory of ``block``, from :func:`icl_lib.dynamics.trajectory`.
        block: the block that read the prompt.
        query: the tokens on which the task's loss is taken, ``[*batch, dim]`` for the same at every step (the query
            itself), or ``[*batch, n, dim]`` for one at each step (the example that is read, as in SGD).
        loss: takes outputs ``[*batch, n, out]`` to losses ``[*batch, n]``.

    NaN where a step or a gradient is zero.
    """
    require_instance("path", path, Trajectory, "give what icl_lib.dynamics.trajectory returns.")
    require_block(block)
    require_float("query", query, 1, "[*batch, dim] or [*batch, n, dim]")
    if query.ndim not in (path.activations.ndim - 1, path.activations.ndim):
        raise ValueError(
            f"query has shape {tuple(query.shape)}: give [*batch, dim], or [*batch, n, dim] for each step."
        )
    each = query if query.ndim == path.activations.ndim else query.unsqueeze(-2)
    bias = path.bias_updates[..., :-1, :] if block.skip else None
    gradients = task_gradients(block, path.updates[..., :-1], each, loss, bias)
    return alignment(path.increments, -gradients)
