"""The edits of one block of a language model: as data, applied during a forward pass, or added to the parameters."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icl_lib.language.places import edited, edited_experts, full_scale, matrix_at, rescaled, split
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import Anatomy
from icl_lib.validation import require_finite


@dataclass(frozen=True, eq=False)
class LanguageBlockPatch:
    r"""The edits of one block of a language model.

    The map of an expert has the path of the parameter with the expert's number, such as ``mlp.experts.down_proj[3]``.
    It has one edit for each token that is sent to it, ``[tokens, out, in]``.

    Attributes:
        inner: $\Delta V$ of each linear map that reads the input of the MLP, the router included:
            ``[*batch, positions, out, in]`` of rank one, or one ``[out, in]`` for all positions.
        outer: the edits that add $\Delta h$, by path: $\Delta W_\text{down}$ with the shapes of the inner edits, and
            for a bias or the scale of a norm a vector, ``[*batch, positions, width]`` or ``[width]``.
        change: $\Delta h$ itself, ``[*batch, positions, width]``.
        sent: in a mixture of experts, the tokens sent to each expert, numbered through batch and positions.
    """

    inner: dict[str, LowRank]
    outer: dict[str, LowRank | Tensor]
    change: Tensor
    sent: dict[int, Tensor]

    @property
    def weight(self) -> LowRank:
        r"""The edit of the first inner map, or of the last map in a parallel block."""
        return next(iter({**self.inner, **self.outer}.values()))

    @property
    def edits(self) -> dict[str, LowRank | Tensor]:
        """All edits, by path."""
        return {**self.inner, **self.outer}

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


def merge_edit(block: nn.Module, where: str, path: str, edit: LowRank | Tensor) -> None:
    """Add the edit to the parameter, in place."""
    if isinstance(edit, LowRank):
        target = matrix_at(block, path)
        target += edit.dense()
    else:
        module = block.get_submodule(path)
        grad = module.weight.requires_grad
        if module.weight.ndim == 1:
            module.weight = full_scale(module.weight.detach() + edit).requires_grad_(grad)
            target = module.weight
        else:
            bias = torch.zeros_like(edit) if module.bias is None else module.bias.detach()
            module.bias = nn.Parameter(bias + edit, requires_grad=grad)
            target = module.bias
    require_finite(
        f"the edited {where}.{path}", target, f"the edit is too large for {target.dtype}; use a wider dtype."
    )


def apply_edits(stack: contextlib.ExitStack, block: nn.Module, anatomy: Anatomy, patch: LanguageBlockPatch) -> None:
    """Make the block run with these edits until the stack is closed."""
    experts: dict[str, dict[int, LowRank]] = {}
    for path, edit in patch.edits.items():
        name, expert = split(path)
        if expert is not None:
            experts.setdefault(name, {})[expert] = edit
        elif path == anatomy.scale:
            stack.enter_context(rescaled(block.get_submodule(path), lambda _, edit=edit: edit))
        else:
            flat = _by_token(edit)
            stack.enter_context(edited(block, path, lambda *_, flat=flat: flat))
    for name, edits in experts.items():
        stack.enter_context(edited_experts(block, name, lambda expert, *_, edits=edits: edits.get(expert)))


def _by_token(edit: LowRank | Tensor) -> LowRank | Tensor:
    """Return the edit with one leading dimension, or with none if it serves all tokens."""
    if isinstance(edit, Tensor):
        return edit.reshape(-1, edit.shape[-1]) if edit.ndim > 1 else edit
    if len(edit.shape) == 2:
        return edit
    return LowRank(*(factor.flatten(0, -3) for factor in (edit[...].left, edit[...].right)))
