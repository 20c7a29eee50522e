"""The edits of one block: as data, applied during a forward pass, or added to the parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from icl_lib.blocks.edits import edited_linear
from icl_lib.blocks.structure import replaced
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import Anatomy
from icl_lib.models.edited_weights import edited, edited_norm, full_scale, holder_of, parameter_at, split
from icl_lib.validation import require_finite


@dataclass(frozen=True, eq=False)
class BlockPatch:
    r"""The edits of one block.

    The map of an expert has the path of the parameter with the expert's number, such as ``mlp.experts.down_proj[3]``.
    It has one edit for each token that is sent to it, ``[tokens, out, in]``.

    Attributes:
        inner: $\Delta W_i$ of each linear map that reads the input of the MLP, a router included:
            ``[*batch, positions, out, in]`` of rank one, or one ``[out, in]`` for all positions.
        outer: the edits that add $\Delta h_i$, by path: for a matrix with the shapes of the inner edits, for a bias
            (then they are $\Delta b'_i$) or the scale of a norm a vector, ``[*batch, positions, width]`` or
            ``[width]``. Empty for a block without a skip connection around its MLP.
        change: $\Delta h_i$ itself, the change of the stream, ``[*batch, positions, width]``.
        sent: in a mixture of experts, the tokens sent to each expert, numbered through batch and positions.
        transposed: the paths whose parameters hold the matrix as ``[in, out]``.
        kind: which weights add $\Delta h_i$: ``down``, ``bias`` or ``scale``.

    It prints in one line, with the shape and the rank of each edit:

    >>> from icl_lib import Transformer, TransformerConfig, absorb
    >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2, norm="pre")).double()
    >>> absorb(model, torch.randn(9, 4).double(), context_length=7).blocks[0]
    BlockPatch(mlp.0 [2, 16, 4] of rank ≤ 1, mlp.2 vector [2, 4]; torch.float64 on cpu)
    """

    inner: dict[str, LowRank]
    outer: dict[str, LowRank | Tensor]
    change: Tensor
    sent: dict[int, Tensor] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    kind: str = "down"

    @property
    def weight(self) -> LowRank:
        r"""$\Delta W$, the edit of the first inner map, or of the last map in a parallel block.

        This and ``bias`` are named as in :class:`icl_lib.blocks.block.ImplicitUpdate`.
        """
        return next(iter(self.edits.values()))

    @property
    def bias(self) -> Tensor | None:
        r"""$\Delta b'$, the edit of the bias of the last map or norm; None if another weight takes the change."""
        return next(iter(self.outer.values()), None) if self.kind == "bias" else None

    @property
    def edits(self) -> dict[str, LowRank | Tensor]:
        """All edits, by path."""
        return {**self.inner, **self.outer}

    def _listed(self) -> str:
        """Return each edit with its shape and rank; the edits of a mixture's experts are counted."""
        experts: dict[str, int] = {}
        parts: dict[str, str] = {}
        for path, edit in self.edits.items():
            name, expert = split(path)
            experts[name] = experts.get(name, 0) + (expert is not None)
            if expert is None:
                if isinstance(edit, LowRank):
                    parts[name] = f"{name} {list(edit.shape)} of rank ≤ {edit.left.shape[-1]}"
                else:
                    parts[name] = f"{name} vector {list(edit.shape)}"
            else:
                times = "1 expert" if experts[name] == 1 else f"{experts[name]} experts"
                parts[name] = f"{name} {list(edit.shape[-2:])} of {times}"
        return ", ".join(parts.values())

    def __repr__(self) -> str:
        return f"BlockPatch({self._listed()}; {self.change.dtype} on {self.change.device})"

    def at(self, positions: slice) -> BlockPatch:
        """Return the edits at some of the positions, as copies that do not keep the others in memory."""

        def chosen(edit: LowRank | Tensor) -> LowRank | Tensor:
            if isinstance(edit, Tensor):
                return edit[..., positions, :].clone()
            # A factor that all positions share has a single entry, which stays shared.
            right = edit.right if edit.right.shape[-3] == 1 else edit.right[..., positions, :, :].clone()
            return LowRank(edit.left[..., positions, :, :].clone(), right)

        inner, outer = ({path: chosen(edit) for path, edit in part.items()} for part in (self.inner, self.outer))
        return BlockPatch(inner, outer, self.change[..., positions, :].clone(), {}, self.transposed, self.kind)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return the size of the inner edits and of the outer edits at each position, ``[*batch, positions]``.

        The size is the Frobenius norm of the position's own edits, over all maps together. Raises `ValueError` for a
        joint patch, whose edits belong to no single position.
        """
        if len(self.weight.shape) == 2:
            raise ValueError(
                "this patch is joint, with one edit for all positions, but norms() needs one for each: make the patch "
                "with joint=False."
            )
        return self._norms(self.inner), self._norms(self.outer)

    def _norms(self, edits: dict[str, LowRank | Tensor]) -> Tensor:
        squares = torch.zeros(self.change.shape[:-1], dtype=self.change.dtype, device=self.change.device).flatten()
        for path, edit in edits.items():
            sizes = edit.norm() if isinstance(edit, LowRank) else torch.linalg.vector_norm(edit, dim=-1)
            expert = split(path)[1]
            if expert is None:
                squares += sizes.flatten().square()
            else:
                squares[self.sent[expert]] += sizes.square()
        return squares.sqrt().reshape(self.change.shape[:-1])

    @contextlib.contextmanager
    def applied(self, block: nn.Module, anatomy: Anatomy, where: str = "the block") -> Iterator[None]:
        """Run the block with these edits inside the ``with``; a single query yields the outputs at all positions.

        The edits stay factors: a linear map outputs $W z + L (R^\\top z)$, as a map with weight $W + L R^\\top$ does.
        """
        experts: dict[str, dict[int, LowRank]] = {}
        with contextlib.ExitStack() as stack:
            for path, edit in self.edits.items():
                name, expert = split(path)
                if expert is not None:
                    experts.setdefault(name, {})[expert] = edit
                elif anatomy.scale and path.removesuffix(".bias") == anatomy.scale:
                    of_bias = path != anatomy.scale
                    stack.enter_context(edited_norm(where, block, anatomy.scale, lambda _, edit=edit: edit, of_bias))
                else:
                    stack.enter_context(edited(where, block, path, lambda _, edit=edit: edit))
            for name, edits in experts.items():
                stack.enter_context(edited(where, block, name, lambda expert, _, edits=edits: edits.get(expert)))
            yield

    def stored(self, path: str, edit: LowRank) -> LowRank:
        """Return an edit in the layout of its parameter."""
        return edit.mT if split(path)[0] in self.transposed else edit

    def add_to(self, block: nn.Module, where: str) -> None:
        """Add the edits to the parameters of the block, in place; each map must have one edit."""
        for path, edit in self.edits.items():
            if isinstance(edit, LowRank):
                target = parameter_at(block, path)
                target += self.stored(path, _single(edit)).dense()
            else:
                target = _add_vector(block, path, _single(edit))
            require_finite(
                f"the edited {where}.{path}", target, f"the edit is too large for {target.dtype}; use a wider dtype."
            )

    def add_batched(self, block: nn.Module, each_alone: bool) -> None:
        """Replace the linear maps of the block by maps that hold one matrix for each edit.

        With ``each_alone``, every position is a sequence of its own, ``[*batch, positions, 1, width]``.
        """
        for path, edit in self.edits.items():
            matrix = isinstance(edit, LowRank)
            if each_alone:
                edit = edit[..., None] if matrix else edit.unsqueeze(-2)
            update = {"weight" if matrix else "bias": edit}
            replaced(block, path, edited_linear(block.get_submodule(path), **update))
        for part in block.modules():
            if isinstance(part, nn.TransformerEncoderLayer):
                part.activation_relu_or_gelu = 0  # keeps it from torch's fused layer, which takes no batched weights


def _single(edit: LowRank | Tensor) -> LowRank | Tensor:
    """Return an edit without its leading dimensions, all of size one."""
    if isinstance(edit, Tensor):
        return edit.reshape(edit.shape[-1])
    return LowRank(*(factor.reshape(factor.shape[-2:]) for factor in (edit.left, edit.right)))


def _add_vector(block: nn.Module, path: str, edit: Tensor) -> Tensor:
    """Add a vector to the scale or the bias of a norm, or to the bias of a linear map, which it may not have yet."""
    module, name = holder_of(block, path)
    if name == "bias":
        module.bias += edit
        return module.bias
    grad = module.weight.requires_grad
    if module.weight.ndim == 1:
        module.weight = full_scale(module.weight.detach() + edit).requires_grad_(grad)
        return module.weight
    bias = torch.zeros_like(edit) if module.bias is None else module.bias.detach()
    module.bias = nn.Parameter(bias + edit, requires_grad=grad)
    return module.bias
