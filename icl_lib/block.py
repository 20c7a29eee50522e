r"""A contextual block, and the weights that stand in for its context.

$$T_W(C, x) = f_\theta(W A(C, x) + b)$$

is a contextual layer $A$ followed by an MLP whose first linear map is $W$ (Dherin et al., arXiv 2507.16003, Section 2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.contextual import check_prompt
from icl_lib.low_rank import LowRank
from icl_lib.theorem import bias_update, weight_update
from icl_lib.validation import require_same_kind, validated_by


class ContextualBlock(nn.Module):
    r"""A contextual layer, then an MLP.

    Args:
        contextual: any module or function ``(context, query) -> [*batch, in]``.
        mlp: any module whose input reaches its output only through its first `torch.nn.Linear`, the $W$ of the theorem.
        skip: add the residual connections, $T(C, x) = x + A(C, x) + \mathrm{mlp}(A(C, x))$. The MLP must then end in a
            `torch.nn.Linear`, whose bias is the $b'$ of the theorem.

    Raises `ValueError` for an MLP that is not of this form: the theorem's edit would not be exact there. What is random
    (dropout in training mode) gives something else each time it runs, so call ``block.eval()`` first.

    >>> from icl_lib import SoftmaxAttention
    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> block = ContextualBlock(SoftmaxAttention(dim=4, heads=2), mlp)
    >>> block(torch.randn(7, 4), torch.randn(4)).shape
    torch.Size([4])
    """

    def __init__(self, contextual: Callable[..., Any], mlp: nn.Module, skip: bool = False) -> None:
        super().__init__()
        self.contextual, self.mlp, self.skip = contextual, mlp, skip
        linears = [name for name, module in mlp.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise ValueError("mlp has no torch.nn.Linear: the theorem edits the first linear map after the context.")
        self._first, self._last = linears[0], linears[-1]
        _require_first_linear_is_the_only_way_in(mlp, self._first)
        if skip:
            _require_last_linear_is_the_output(mlp, self._last)

    @property
    def first_linear(self) -> nn.Module:
        """The linear map that reads the contextual layer; its weight is the theorem's $W$."""
        return self.mlp.get_submodule(self._first)

    @property
    def last_linear(self) -> nn.Module:
        """The linear map that writes the MLP's output; its bias is the theorem's $b'$ where there is a skip."""
        return self.mlp.get_submodule(self._last)

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch out"]:
        """The block's output at the query; ``context`` may hold no token."""
        activation = self.contextual(context, query)
        output = self.mlp(activation)
        return query + activation + output if self.skip else output


def _check_implicit_update(block: ContextualBlock, context: Any, query: Any, keep: Any) -> None:
    check_prompt(context, query)
    require_same_kind("block's weight", block.first_linear.weight, context=context)
    if context.shape[-2] == 0:
        raise ValueError("context is empty: there is nothing to turn into weights. Give it at least one token.")
    _kept_indices(keep, context.shape[-2])


@dataclass(frozen=True, eq=False)
class ImplicitUpdate:
    """The weight edit that replaces a part of a context; see :func:`implicit_update`.

    Attributes:
        weight: the rank-one $ΔW$ of the MLP's first linear map, ``[*batch, out, in]``.
        bias: the $Δb'$ of its last one, ``[*batch, dim]``; None for a block without skip connections.
    """

    weight: LowRank
    bias: Tensor | None

    def __getitem__(self, index: Any) -> ImplicitUpdate:
        """The update of one batch entry, or of several."""
        return ImplicitUpdate(self.weight[index], None if self.bias is None else self.bias[index])

    def apply(self, block: ContextualBlock) -> ContextualBlock:
        """A copy of ``block`` with edited weights; ``block`` is left as it was.

        The copy's own forward pass runs on $W + ΔW$, formed in full: nothing of the contextual activation enters it. A
        batched update gives a block that holds one weight matrix for each batch entry, so it takes prompts of that
        batch shape.

        Raises `ValueError` where the update does not fit the block in shape, dtype, device or skip connection.
        """
        _require_fit(self, block)
        edited = copy.deepcopy(block)
        with torch.no_grad():
            _set_linear(edited.mlp, edited, block._first, weight=self.weight)
            if self.bias is not None:
                _set_linear(edited.mlp, edited, block._last, bias=self.bias)
        return edited


@validated_by(_check_implicit_update)
def implicit_update(
    block: ContextualBlock,
    context: Float[Tensor, "*batch n dim"],
    query: Float[Tensor, "*batch dim"],
    keep: Sequence[int] | Tensor | None = None,
) -> ImplicitUpdate:
    r"""The edit of a block's weights that does what a part of its context did.

    $$T_{W}(C, x) = T_{W + \Delta W,\, b' + \Delta b'}(C \setminus Y, x), \qquad
      \Delta W = \frac{W (a_C - a_0) a_0^\top}{\lVert a_0 \rVert^2}, \quad \Delta b' = a_C - a_0 \text{ (with skips)}$$

    where $a_C = A(C, x)$ and $a_0 = A(C \setminus Y, x)$. Source: Dherin et al., Theorem 2.2 and Theorem B.2.

    Args:
        block: the block whose weights are edited (in the result's ``apply``; here nothing is changed).
        context: ``[*batch, n, dim]``, ``n ≥ 1``.
        query: ``[*batch, dim]``.
        keep: indices into the context of the tokens that stay, $C \setminus Y$; None removes the whole context.

    Raises `ValueError` for an empty context, unknown or repeated indices, a zero, NaN or infinite $a_0$, and for
    shapes, dtypes or devices that do not fit.

    >>> from icl_lib import SoftmaxAttention
    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> block = ContextualBlock(SoftmaxAttention(dim=4, heads=2), mlp).double()
    >>> context, query = torch.randn(7, 4).double(), torch.randn(4).double()
    >>> edited = implicit_update(block, context, query).apply(block)
    >>> torch.allclose(edited(context[:0], query), block(context, query), rtol=1e-12)
    True
    >>> torch.allclose(block(context[:0], query), block(context, query), rtol=1e-2)  # the same without the edit
    False
    """
    with torch.no_grad():
        a_with = block.contextual(context, query)
        a_without = block.contextual(kept_context(context, keep), query)
        return ImplicitUpdate(
            weight=weight_update(block.first_linear.weight, a_without, a_with),
            bias=bias_update(a_without, a_with) if block.skip else None,
        )


def kept_context(
    context: Float[Tensor, "*batch n dim"], keep: Sequence[int] | Tensor | None = None
) -> Float[Tensor, "*batch kept dim"]:
    """The context that remains, $C ∖ Y$: the tokens at the indices ``keep``, in the order of the context.

    Raises `ValueError` for an index outside ``0 … n − 1``, a repeated one, or one that is not a whole number.

    >>> kept_context(torch.tensor([[0.0], [1.0], [2.0]]), keep=[2, 0])
    tensor([[0.],
            [2.]])
    >>> kept_context(torch.zeros(3, 1)).shape
    torch.Size([0, 1])
    """
    indices = _kept_indices(keep, context.shape[-2])
    return context[..., torch.tensor(indices, dtype=torch.long, device=context.device), :]


def _kept_indices(keep: Any, length: int) -> list[int]:
    if keep is None:
        return []
    listed = keep.tolist() if isinstance(keep, Tensor) else keep
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise ValueError(f"keep is a {type(keep).__name__}: give a sequence of indices, or None to keep no token.")
    for place, index in enumerate(listed):
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise ValueError(
                f"keep[{place}] is {index!r}: give indices as whole numbers (mask.nonzero().flatten() of a mask)."
            )
        if not 0 <= index < length:
            raise ValueError(f"keep[{place}] is {index}: the context has tokens 0 … {length - 1}.")
    if len(set(listed)) < len(listed):
        raise ValueError(f"keep names a token twice: {list(listed)}. Name each token that stays once.")
    return sorted(int(index) for index in listed)


class _BatchedLinear(nn.Module):
    """A linear map with its own weights for each batch entry: ``[*batch, out, in]`` on inputs ``[*batch, in]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = (self.weight @ inputs.unsqueeze(-1)).squeeze(-1)
        return outputs if self.bias is None else outputs + self.bias


def _set_linear(
    mlp: nn.Module,
    block: ContextualBlock,
    name: str,
    weight: LowRank | None = None,
    bias: Tensor | None = None,
) -> None:
    """Add an update to the linear map ``name`` of ``block.mlp``; where it is batched, one map a batch entry."""
    old = mlp.get_submodule(name)
    new_weight = old.weight.detach() if weight is None else old.weight.detach() + weight.dense()
    new_bias = None if old.bias is None else old.bias.detach()
    if bias is not None:
        new_bias = bias if new_bias is None else new_bias + bias
    if isinstance(old, nn.Linear) and new_weight.ndim == 2 and (new_bias is None or new_bias.ndim == 1):
        old.weight = nn.Parameter(new_weight)
        old.bias = None if new_bias is None else nn.Parameter(new_bias)
        return
    batched = _BatchedLinear(new_weight, new_bias)
    if name:
        parent, _, child = name.rpartition(".")
        setattr(mlp.get_submodule(parent), child, batched)
    else:
        block.mlp = batched


def _require_fit(update: ImplicitUpdate, block: ContextualBlock) -> None:
    weight = block.first_linear.weight
    require_same_kind("block's weight", weight, update=update.weight)
    if update.weight.shape[-2:] != weight.shape[-2:]:
        raise ValueError(
            f"the update is {tuple(update.weight.shape)} and the block's weight {tuple(weight.shape)}: "
            "apply it to the block (or a copy of the block) that it was computed from."
        )
    if (update.bias is not None) != block.skip:
        raise ValueError(
            f"the update {'has' if update.bias is not None else 'lacks'} a bias part and the block has "
            f"skip={block.skip}: compute the update from a block with the same skip."
        )


def _probe(mlp: nn.Module, name: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Run a copy of the MLP on two inputs with its linear map ``name`` answering the same both times.

    Returns the inputs, what that map read, and the outputs.
    """
    mlp = copy.deepcopy(mlp).eval()
    linear = mlp.get_submodule(name)
    first = next(module for module in mlp.modules() if isinstance(module, nn.Linear))
    read: list[Tensor] = []

    def answer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        read.append(args[0])
        return torch.ones_like(output)

    linear.register_forward_hook(answer)
    ramp = torch.linspace(-1, 1, first.in_features).to(first.weight)
    inputs = [ramp.unsqueeze(0), ramp.square().unsqueeze(0) + 1]
    with torch.no_grad():
        outputs = [mlp(x) for x in inputs]
    return inputs, read, outputs


def _require_first_linear_is_the_only_way_in(mlp: nn.Module, name: str) -> None:
    inputs, read, outputs = _probe(mlp, name)
    if len(read) != 2 or not all(map(torch.equal, inputs, read)):
        raise ValueError(
            f"mlp's first linear map ({name or 'the module itself'}) does not read mlp's input as it is: "
            "move what stands before it into the contextual layer."
        )
    if not torch.equal(*outputs):
        raise ValueError(
            f"mlp's output depends on its input by another way than its first linear map ({name}): a gate or a skip "
            "connection inside. The theorem's edit of that map alone is not exact there; use skip=True for a skip around "
            "the block."
        )


def _require_last_linear_is_the_output(mlp: nn.Module, name: str) -> None:
    _, _, outputs = _probe(mlp, name)
    if not all(torch.equal(output, torch.ones_like(output)) for output in outputs):
        raise ValueError(
            f"with skip=True mlp must end in a torch.nn.Linear, whose bias takes the residual; after its last one "
            f"({name}) mlp still changes the output."
        )
