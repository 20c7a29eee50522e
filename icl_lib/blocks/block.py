r"""A contextual block, and the edit of its weights that replaces its context.

$$T_W(C, x) = f_\theta(W A(C, x) + b)$$

is a contextual layer $A$ followed by an MLP whose first linear map is $W$ (Dherin et al., arXiv 2507.16003, version 1,
Section 2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.contextual import require_prompt
from icl_lib.blocks.edits import edited_linear
from icl_lib.blocks.structure import first_and_last_linear, replaced, require_deterministic
from icl_lib.low_rank import LowRank
from icl_lib.theorem import bias_update, weight_update
from icl_lib.validation import require_broadcastable, require_float, require_instance, require_same_kind


class ContextualBlock(nn.Module):
    r"""A contextual layer followed by an MLP.

    Args:
        contextual: any module or function ``(context, query) -> [*batch, in]``.
        mlp: any module whose input reaches its output only through its first `torch.nn.Linear`, the theorem's $W$.
        skip: whether there are residual connections, $T(C, x) = x + A(C, x) + \mathrm{mlp}(A(C, x))$. The MLP must then
            end in a `torch.nn.Linear`, whose bias is the theorem's $b'$.

    Raises `ValueError` for an MLP that is not of this form, because the theorem's edit would not be exact. The form is
    tested when the block is made (:mod:`icl_lib.blocks.structure`), so do not change ``mlp`` or ``skip`` afterwards.
    Modules with random outputs, such as dropout in training mode, are refused when an edit is computed: call
    ``block.eval()`` first.

    >>> from icl_lib import SoftmaxAttention
    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> block = ContextualBlock(SoftmaxAttention(dim=4, heads=2), mlp)
    >>> block(torch.randn(7, 4), torch.randn(4)).shape
    torch.Size([4])
    """

    def __init__(self, contextual: Callable[..., Any], mlp: nn.Module, skip: bool = False) -> None:
        super().__init__()
        if not callable(contextual):
            raise ValueError(
                f"contextual is a {type(contextual).__name__}: give a function (context, query) -> [*batch, in]."
            )
        require_instance("mlp", mlp, nn.Module, "give a torch.nn.Module.")
        if not isinstance(skip, bool):
            raise ValueError(f"skip is {skip!r}: give True or False.")
        self._first, self._last = first_and_last_linear(mlp, output_bias=skip)
        self.contextual, self.mlp, self.skip = contextual, mlp, skip

    @property
    def first_linear(self) -> nn.Module:
        """The linear map that reads the contextual layer's output; its weight is the theorem's $W$."""
        return self.mlp.get_submodule(self._first)

    @property
    def last_linear(self) -> nn.Module:
        """The MLP's last linear map; with ``skip``, its bias is the theorem's $b'$."""
        return self.mlp.get_submodule(self._last)

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch out"]:
        """The block's output at the query; ``context`` may hold no token."""
        require_prompt(context, query)
        activation = self.contextual(context, query)
        output = self.mlp(activation)
        return query + activation + output if self.skip else output

    def at_query(self, sequence: Float[Tensor, "*batch n dim"]) -> Float[Tensor, "*batch out"]:
        """The block's output at the last token of a sequence, whose context are the others."""
        return self(sequence[..., :-1, :], sequence[..., -1, :])

    def read(self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]) -> Tensor:
        """The MLP's input, $A(C, x)$, with its shape, dtype and device checked."""
        try:
            read = self.contextual(context, query)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, RuntimeError, AssertionError, IndexError) as error:  # whatever the layer's own code raises
            raise ValueError(
                f"the contextual layer does not run as layer(context, query) with {list(context.shape)} and "
                f"{list(query.shape)}: {error}. Wrap it in a module whose forward(context, query) calls it."
            ) from error
        weight = self.first_linear.weight
        wanted = (*query.shape[:-1], weight.shape[-1])
        if not isinstance(read, Tensor) or read.shape != wanted:
            got = tuple(read.shape) if isinstance(read, Tensor) else type(read).__name__
            raise ValueError(
                f"the contextual layer returned {got} for a query {tuple(query.shape)}: it must return {wanted}."
            )
        require_same_kind("block's weight", weight, **{"the contextual layer's output": read})
        return read


def require_block(block: ContextualBlock) -> None:
    """Raise a `ValueError` for anything but a contextual block."""
    remedy = "give a ContextualBlock. For a Transformer of one block, call its .contextual_block()."
    require_instance("block", block, ContextualBlock, remedy)


def require_block_prompt(block: ContextualBlock, context: Tensor, query: Tensor) -> None:
    """Raise a `ValueError` unless the block is a contextual block and the prompt fits it and has a context."""
    require_block(block)
    require_prompt(context, query)
    require_same_kind("block's weight", block.first_linear.weight, context=context)
    require_deterministic(block, "block")
    if context.shape[-2] == 0:
        raise ValueError("context is empty: there is nothing to turn into an edit. Give at least one token.")


@dataclass(frozen=True, eq=False)
class ImplicitUpdate:
    """The edit that replaces a part of a context; made by :func:`implicit_update`.

    Attributes:
        weight: $ΔW$, of rank one, for the MLP's first linear map: ``[*batch, out, in]``.
        bias: $Δb'$, for the bias of its last linear map: ``[*batch, dim]``; None for a block without skip connections.
    """

    weight: LowRank
    bias: Tensor | None

    def __repr__(self) -> str:
        bias = "None" if self.bias is None else f"vector {list(self.bias.shape)}"
        return f"ImplicitUpdate(weight={self.weight}, bias={bias})"

    def __getitem__(self, index: Any) -> ImplicitUpdate:
        """Index the leading dimensions."""
        within = (*index, slice(None)) if isinstance(index, tuple) else (index, slice(None))
        return ImplicitUpdate(self.weight[index], None if self.bias is None else self.bias[within])

    def apply(self, block: ContextualBlock) -> ContextualBlock:
        """Return a copy of ``block`` with edited weights; ``block`` itself does not change.

        The copy holds the matrix $W + ΔW$ and runs its own forward pass; it has no access to the contextual
        activation. A batched update gives a block with one weight matrix for each batch entry, which takes prompts of
        this batch shape.

        Raises `ValueError` if the update does not match the block in shape, dtype, device or skip connection, or if
        the edited weights overflow.
        """
        require_block(block)
        weight = block.first_linear.weight
        require_same_kind("block's weight", weight, update=self.weight)
        if self.weight.shape[-2:] != weight.shape[-2:]:
            raise ValueError(
                f"the update is {tuple(self.weight.shape)} and the block's weight {tuple(weight.shape)}: "
                "apply it to the block (or a copy of the block) that it was computed from."
            )
        require_broadcastable(update=self.weight.batch_shape, block=weight.shape[:-2])
        if (self.bias is not None) != block.skip:
            raise ValueError(
                f"the update {'has' if self.bias is not None else 'lacks'} a bias part and the block has "
                f"skip={block.skip}: compute the update from a block with the same skip."
            )
        if self.bias is not None:
            require_same_kind("block's weight", weight, bias=self.bias)
            wanted = (*self.weight.batch_shape, weight.shape[-1])
            if self.bias.shape != wanted:
                raise ValueError(
                    f"the update's bias has shape {tuple(self.bias.shape)}, but its weight update has shape "
                    f"{tuple(self.weight.shape)}: the bias must have shape {wanted}."
                )
        edited = copy.deepcopy(block)
        with torch.no_grad():
            # The linear map is replaced, not changed in place: another layer may share it and must keep the old one.
            edited.mlp = replaced(edited.mlp, block._first, edited_linear(edited.first_linear, weight=self.weight))
            if self.bias is not None:
                edited.mlp = replaced(edited.mlp, block._last, edited_linear(edited.last_linear, bias=self.bias))
        return edited


def implicit_update(
    block: ContextualBlock,
    context: Float[Tensor, "*batch n dim"],
    query: Float[Tensor, "*batch dim"],
    keep: Iterable | None = None,
) -> ImplicitUpdate:
    r"""The edit of a block's weights that replaces a part of its context.

    $$T_{W}(C, x) = T_{W + \Delta W,\, b' + \Delta b'}(C \setminus Y, x), \qquad
      \Delta W = \frac{W (a_C - a_0) a_0^\top}{\lVert a_0 \rVert^2}, \quad \Delta b' = a_C - a_0 \text{ (with skips)}$$

    where $a_C = A(C, x)$ and $a_0 = A(C \setminus Y, x)$. Source: Dherin et al. (arXiv 2507.16003), Theorem 2.2 and the
    appendix on skip connections in version 1; Theorems 2.3 and C.2 in version 4.

    Args:
        block: the block. It does not change; :meth:`ImplicitUpdate.apply` returns an edited copy.
        context: ``[*batch, n, dim]``, with ``n ≥ 1``.
        query: ``[*batch, dim]``.
        keep: indices of the context tokens that are kept, $C \setminus Y$; None removes the whole context.

    Raises `ValueError` for an empty context, for unknown or repeated indices, for a zero $a_0$, for NaN or infinite
    activations, and for shapes, dtypes or devices that do not match.

    >>> from icl_lib import SoftmaxAttention
    >>> mlp = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
    >>> block = ContextualBlock(SoftmaxAttention(dim=4, heads=2), mlp).double()
    >>> context, query = torch.randn(7, 4).double(), torch.randn(4).double()
    >>> edited = implicit_update(block, context, query).apply(block)
    >>> wanted = block(context, query)
    >>> bool((edited(context[:0], query) - wanted).norm() < 1e-12 * wanted.norm())
    True
    >>> bool((block(context[:0], query) - wanted).norm() < 1e-2 * wanted.norm())  # the same without the edit
    False
    """
    require_block_prompt(block, context, query)
    kept = kept_context(context, keep)
    with torch.no_grad():
        a_with, a_without = block.read(context, query), block.read(kept, query)
        return ImplicitUpdate(
            weight=weight_update(block.first_linear.weight, a_without, a_with),
            bias=bias_update(a_without, a_with) if block.skip else None,
        )


def kept_context(
    context: Float[Tensor, "*batch n dim"], keep: Iterable | None = None
) -> Float[Tensor, "*batch kept dim"]:
    """The kept part of the context, $C ∖ Y$: the tokens at the indices ``keep``, in the order of the context.

    Raises `ValueError` for an index outside ``0 … n − 1``, a repeated one, or one that is not a whole number.

    >>> kept_context(torch.tensor([[0.0], [1.0], [2.0]]), keep=[2, 0])
    tensor([[0.],
            [2.]])
    >>> kept_context(torch.zeros(3, 1)).shape
    torch.Size([0, 1])
    """
    require_float("context", context, 2, "[*batch, n, dim]")
    length, listed = context.shape[-2], keep.tolist() if hasattr(keep, "tolist") else keep
    if listed is None:
        return context[..., :0, :]
    if not isinstance(listed, Sequence) or isinstance(listed, (str, bytes)):
        raise ValueError(f"keep is a {type(keep).__name__}: give a sequence of indices, or None to keep no token.")
    indices = [index.item() if hasattr(index, "item") else index for index in listed]
    for place, index in enumerate(indices):
        if isinstance(index, bool) or not isinstance(index, int):
            raise ValueError(
                f"keep[{place}] is {index!r}: give indices as whole numbers; for a mask, mask.nonzero().flatten()."
            )
        if not 0 <= index < length:
            tokens = f"the context has tokens 0 … {length - 1}" if length else "the context is empty"
            raise ValueError(f"keep[{place}] is {index}: {tokens}.")
    if len(set(indices)) < len(indices):
        raise ValueError(f"keep names a token twice: {indices}. Give each index once.")
    return context[..., torch.tensor(sorted(indices), dtype=torch.long, device=context.device), :]
