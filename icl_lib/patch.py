r"""The edits that replace a context in a whole model, applied as factors by hooks or merged into a copy's weights.

:func:`icl_lib.absorb.absorb` computes them.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.blocks.edits import edited_linear
from icl_lib.blocks.structure import replaced
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import Anatomy, anatomy_of


@dataclass(frozen=True, eq=False)
class BlockPatch:
    r"""The edits of one block, one for each position.

    Attributes:
        inner: $\Delta W_i$ of each linear map that reads the MLP's input, by its path in the block:
            ``[*batch, positions, out, in]``, of rank one.
        outer: $\Delta b'_i$ of the MLP's output bias, ``[*batch, positions, width]``; None for a block without skip
            connections.
    """

    inner: dict[str, LowRank]
    outer: Tensor | None

    @property
    def weight(self) -> LowRank:
        r"""The $\Delta W_i$ of the first inner map."""
        return next(iter(self.inner.values()))

    def at(self, positions: slice) -> BlockPatch:
        """Return the edits at some of the positions, as copies that do not keep the others in memory."""
        # A factor that all positions share has a single entry, which stays shared.
        inner = {
            path: LowRank(
                update.left[..., positions, :, :].clone(),
                update.right if update.right.shape[-3] == 1 else update.right[..., positions, :, :].clone(),
            )
            for path, update in self.inner.items()
        }
        return BlockPatch(inner, None if self.outer is None else self.outer[..., positions, :].clone())

    def each_alone(self) -> BlockPatch:
        """Return the same edits for positions that run as sequences of one token: ``[*batch, positions, 1, …]``."""
        inner = {path: update[..., None] for path, update in self.inner.items()}
        return BlockPatch(inner, None if self.outer is None else self.outer.unsqueeze(-2))

    @contextlib.contextmanager
    def applied(self, block: nn.Module, anatomy: Anatomy) -> Iterator[None]:
        """Run the block with these edits inside the ``with``; a single query yields the outputs at all positions.

        The edits stay factors: a linear map outputs $W z + L (R^\\top z)$, as a map with weight $W + L R^\\top$ does.
        """
        with contextlib.ExitStack() as hooks:
            for path, update in self.inner.items():
                hook = block.get_submodule(path).register_forward_hook(_adding(update))
                hooks.callback(hook.remove)
            if self.outer is not None:
                outer = self.outer
                hook = block.get_submodule(anatomy.outer).register_forward_hook(lambda _, __, output: output + outer)
                hooks.callback(hook.remove)
            yield


def _adding(update: LowRank) -> Callable[..., Tensor]:
    return lambda _, inputs, output: update.addmv(output, inputs[0])


@dataclass(frozen=True, eq=False)
class Patch:
    """The weight edits that replace a context in a model; made by :func:`icl_lib.absorb.absorb`.

    Attributes:
        blocks: the edits, block by block.
        anatomy: the places of the edited maps in the model.
        reference: the input of the patched blocks, ``query`` or ``self``.
        first: the first position in the sequence that has an edit.
        context_length: number of tokens that the patch replaces.
    """

    blocks: tuple[BlockPatch, ...]
    anatomy: Anatomy
    reference: str
    first: int
    context_length: int

    def bare(self, inputs: Tensor) -> Tensor:
        """Return the patched model's input in place of ``inputs`` ``[*batch, n, dim]``.

        Reference ``query``: the tokens after the context, ``[*batch, m, dim]``. Reference ``self``: each token as a
        sequence of its own, ``[*batch, positions, 1, dim]``.
        """
        return without_context(inputs, self.context_length, self.reference, self.first)

    def at_query(self) -> Patch:
        """Return the patch with only the edits at the positions after the context."""
        kept = tuple(block.at(slice(self.context_length - self.first, None)) for block in self.blocks)
        return Patch(kept, self.anatomy, self.reference, self.context_length, self.context_length)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Patch the model inside the ``with``: ``model(patch.bare(inputs))`` outputs what ``model(inputs)`` does.

        The model is not copied, and the edits are never formed as matrices. On leaving, also by an exception, the model
        is restored. Other threads see the patched model too, and copies made inside are patched.

        Raises `ValueError` for a model with another anatomy or other sizes, for a model that is already patched, and,
        inside, for inputs of another shape than the patch was made for. Other weights of the same size are not noticed.

        >>> from icl_lib import Transformer, TransformerConfig, absorb
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2, norm="pre")).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> patch = absorb(model, inputs, context_length=8)
        >>> with patch.applied(model):
        ...     output = model(inputs[8:])
        >>> torch.allclose(output, model(inputs)[8:], rtol=1e-12)
        True
        """
        running = self._as_run()
        with contextlib.ExitStack() as stack:
            for where, block, edits in self._pairs(model, running):
                shape = edits.weight.shape[:-2]
                reader = block.get_submodule(self.anatomy.inner[0])
                check = reader.register_forward_pre_hook(_requiring(shape, where))
                stack.callback(check.remove)
                stack.enter_context(edits.applied(block, self.anatomy))
            yield model

    def merged(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with edited weights, for which ``patch.bare(inputs)`` is the input.

        A single edit gives ordinary linear maps. Several edits give maps that hold a full matrix for each batch entry
        and position. The copy needs no hooks, and ``model`` is not changed.

        Raises `ValueError` as :meth:`applied` does, and if an edited weight overflows.

        >>> from icl_lib import Transformer, TransformerConfig, absorb
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2)).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> edited = absorb(model, inputs, context_length=8).merged(model)
        >>> torch.allclose(edited(inputs[8:]), model(inputs)[8:], rtol=1e-12)
        True
        """
        edited = copy.deepcopy(model)
        with torch.no_grad():
            for _, block, edits in self._pairs(edited, self._as_run()):
                _merge(block, edits, self.anatomy)
        return edited

    def _as_run(self) -> tuple[BlockPatch, ...]:
        """Return the edits for a run of the whole network, in the layout of its input."""
        if self.reference == "query":
            return self.at_query().blocks
        return tuple(block.each_alone() for block in self.blocks)

    def _pairs(self, model: nn.Module, patches: tuple[BlockPatch, ...]) -> Iterator[tuple[str, nn.Module, BlockPatch]]:
        if anatomy_of(model) != self.anatomy:
            raise ValueError(
                f"model has the anatomy {anatomy_of(model)} and the patch was made for {self.anatomy}: "
                "patch the model that it was made from."
            )
        blocks = list(model.get_submodule(self.anatomy.blocks))
        if len(blocks) != len(patches):
            raise ValueError(
                f"model has {len(blocks)} blocks and the patch {len(patches)}: patch the model that it was made from."
            )
        for index, (block, edits) in enumerate(zip(blocks, patches, strict=True)):
            where = f"{self.anatomy.blocks}[{index}]"
            for path, update in edits.inner.items():
                weight = block.get_submodule(path).weight
                if (weight.shape, weight.dtype, weight.device) != (update.shape[-2:], update.dtype, update.device):
                    raise ValueError(
                        f"{where}.{path} is {tuple(weight.shape)}, {weight.dtype} on {weight.device} and its edit "
                        f"is {tuple(update.shape[-2:])}, {update.dtype} on {update.device}: patch the model that the "
                        "patch was made from."
                    )
            yield where, block, edits


def _requiring(shape: torch.Size, where: str) -> Callable[..., None]:
    def check(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[:-1] != shape:
            raise ValueError(
                f"{where} reads {tuple(args[0].shape[:-1])} tokens, but its patch was made for {tuple(shape)}: "
                "call the patched model with patch.bare(inputs)."
            )

    return check


def _merge(block: nn.Module, edits: BlockPatch, anatomy: Anatomy) -> None:
    """Replace the block's linear maps by edited ones."""
    single = edits.weight.shape[:-2].numel() == 1
    for path, update in edits.inner.items():
        update = LowRank(update.left.flatten(0, -3)[0], update.right.flatten(0, -3)[0]) if single else update
        replaced(block, path, edited_linear(block.get_submodule(path), weight=update))
    if edits.outer is not None:
        bias = edits.outer.flatten(0, -2)[0] if single else edits.outer
        replaced(block, anatomy.outer, edited_linear(block.get_submodule(anatomy.outer), bias=bias))


def without_context(stream: Tensor, context_length: int, reference: str, first: int) -> Tensor:
    """Return the input that replaces a sequence ``[*batch, n, width]`` without its context; see :meth:`Patch.bare`."""
    return stream[..., context_length:, :] if reference == "query" else stream[..., first:, :].unsqueeze(-2)
