r"""The true gradient: of the task's loss, at the weights on their way, beside the step that reading a token takes.

The matrix that reads $a$ has a gradient of rank one: with $z = W' a + b$, $\nabla_{W'} \ell = (\partial \ell/\partial
z)\, a^\top$. Autograd gives $\partial \ell / \partial z$ at every token of every prompt in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.block import ContextualBlock
from icl_lib.dynamics.path import Trajectory
from icl_lib.low_rank import LowRank
from icl_lib.theorem import alignment
from icl_lib.validation import require_broadcastable, require_float, require_same_kind, validated_by

Loss = Callable[[Tensor], Tensor]


def _check_answers(block: Any, updates: Any, query: Any) -> None:
    if not isinstance(block, ContextualBlock):
        raise ValueError(f"block is a {type(block).__name__}: give a ContextualBlock.")
    if not isinstance(updates, LowRank):
        raise ValueError(f"updates is a {type(updates).__name__}: give a LowRank, such as trajectory(…).updates.")
    require_float("query", query, 1, "[*batch, dim]")
    require_same_kind("block's weight", block.first_linear.weight, updates=updates, query=query)
    require_broadcastable(updates=updates.batch_shape, query=query.shape[:-1])


def _check_task_gradients(block: Any, updates: Any, query: Any, loss: Any) -> None:
    _check_answers(block, updates, query)
    if not callable(loss):
        raise ValueError(f"loss is a {type(loss).__name__}: give a function of the block's outputs.")


@validated_by(_check_answers)
def answers(
    block: ContextualBlock, updates: LowRank, query: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*answers out"]:
    r"""What a block answers to the bare query with the weights $W + $ ``updates``, kept as factors.

    Its own forward pass without a context, in which the first linear map answers $W a + b + L (R^\top a)$.

    Shapes: ``updates`` ``[*batch, out, in]``, ``query`` ``[*batch, dim]``; leading dimensions broadcast.

    >>> from icl_lib import MeanPooling
    >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(2, 2))
    >>> query, none = torch.randn(2), LowRank(torch.zeros(5, 2, 1), torch.zeros(2, 1))
    >>> torch.equal(answers(block, none, query)[3], block(query[None][:0], query))
    True
    """
    with torch.no_grad():
        return _run(block, updates, query)[0]


def _run(block: ContextualBlock, updates: LowRank, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output; what the first linear map read; and what it answered, from where gradients are taken."""
    query = query.expand(*torch.broadcast_shapes(updates.batch_shape, query.shape[:-1]), -1)
    seen: list[Tensor] = []

    def edit(_: Any, read: tuple[Tensor], answer: Tensor) -> Tensor:
        edited = updates.addmv(answer, read[0]).detach().requires_grad_()
        seen.extend((read[0].detach(), edited))
        return edited

    hook = block.first_linear.register_forward_hook(edit)
    try:
        return block(query.unsqueeze(-2)[..., :0, :], query), *seen
    finally:
        hook.remove()


@validated_by(_check_task_gradients)
def task_gradients(block: ContextualBlock, updates: LowRank, query: Float[Tensor, "*batch dim"], loss: Loss) -> LowRank:
    r"""The gradient of a loss with respect to the first linear map, at the weights $W + $ ``updates``, without context.

    Args:
        block: run on the bare query with each of the edited weights; it is left as it was.
        updates: ``[*batch, out, in]``, such as the ``updates`` of a trajectory.
        query: ``[*batch, dim]``; leading dimensions broadcast with those of ``updates``.
        loss: takes the block's outputs ``[*batch, out]`` to losses ``[*batch]``.

    Returns $\nabla_{W'} \ell$ as ``[*batch, out, in]``, of rank one.

    >>> from icl_lib import MeanPooling
    >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(2, 1, bias=False))
    >>> none = LowRank(torch.zeros(1, 1), torch.zeros(2, 1))
    >>> task_gradients(block, none, torch.tensor([1.0, 3.0]), lambda output: output[..., 0]).dense()
    tensor([[1., 3.]])
    """
    with torch.enable_grad():
        output, read, answer = _run(block, updates, query)
        (slope,) = torch.autograd.grad(loss(output).sum(), answer)
    return LowRank(slope.unsqueeze(-1), read.unsqueeze(-1))


def step_alignment(path: Trajectory, block: ContextualBlock, query: Tensor, loss: Loss) -> Float[Tensor, "*batch n"]:
    r"""The cosine between each token's step and the true descent direction at the weights that the step starts from.

    $$\cos\bigl(W_i - W_{i-1},\; -\nabla_{W'}\, \ell(T_{W'}(x))\big|_{W' = W_{i-1}}\bigr), \qquad i = 1 \dots n$$

    1 where reading the token is a gradient step on the task's loss, 0 where it has nothing to do with it.

    Args:
        path: of ``block``, from :func:`icl_lib.dynamics.trajectory`.
        block: whose path it is.
        query: the tokens on which the task's loss is taken, ``[*batch, dim]`` for the same at every step (the query
            itself), or ``[*batch, n, dim]`` for one at each step (the example that is being read, as SGD would).
        loss: takes outputs ``[*batch, n, out]`` to losses ``[*batch, n]``.

    NaN where a step or a gradient is zero, and has no direction.
    """
    batch = path.activations.shape[:-2]
    each = query if query.ndim == len(batch) + 2 else query.unsqueeze(-2)
    gradients = task_gradients(block, path.updates[..., :-1], each, loss)
    return alignment(path.increments, -gradients)
