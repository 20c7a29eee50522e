r"""The edits of a language model that replace its prompt: applied as factors, merged, or saved as an adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from icl_lib.language.adapter import write_adapter
from icl_lib.language.block_patch import LanguageBlockPatch, apply_edits, merge_edit
from icl_lib.language.call import Call, bare_call, experts_one_by_one
from icl_lib.language.passes import Prompted, without_context
from icl_lib.language.places import matrix_at, vector_at
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import Anatomy, anatomy_of
from icl_lib.patch import Patch


def _no_model() -> None:
    """Return no model: what a patch that was loaded from a file knows of the model that it was made from."""


@dataclass(frozen=True, eq=False)
class LanguagePatch(Patch):
    """The edits of a language model that replace a prompt; made by :func:`icl_lib.absorb.absorb`.

    Attributes:
        blocks: the edits, block by block.
        anatomy, reference, first, context_length: as in :class:`~icl_lib.patch.Patch`.
        outer_kind: which weights add the change of the stream: ``down``, ``bias`` or ``scale``.
        prompted: the query and what the blocks read with the context; a joint patch is computed from it.
        is_joint: whether one edit of each map serves all positions.
        source: returns the model that the patch was made from, or None if it no longer exists.
    """

    blocks: tuple[LanguageBlockPatch, ...]
    anatomy: Anatomy
    reference: str
    first: int
    context_length: int
    outer_kind: str
    prompted: Prompted
    is_joint: bool
    source: Callable[[], nn.Module | None]

    def __reduce__(self) -> tuple:
        # A weak reference cannot be pickled, and the model is not part of the patch.
        kept = (getattr(self, field.name) for field in fields(self) if field.name != "source")
        return type(self), (*kept, _no_model)

    def bare(self, inputs: Tensor) -> Call:
        """Return the call of the edited model that replaces token ids ``[*batch, n]``: ``model(**patch.bare(ids))``.

        It has the ids without their context, and their positions if the model takes them. For reference ``query`` they
        are ``[batch, m]``; for reference ``self`` each token is a sequence of its own, ``[batch · positions, 1]``.
        """
        call = bare_call(inputs, self.context_length, self.reference, self.first)
        return {name: part for name, part in call.items() if name in self.prompted.bare}

    def at_query(self) -> LanguagePatch:
        """Return the patch itself if it has edits for the query only."""
        if self.first != self.context_length:
            raise ValueError(
                "this patch also has edits for the context's positions, and only the query's are used here: make the "
                "patch with positions='query'."
            )
        return self

    def joint(self, model: nn.Module, formed: bool = False) -> LanguagePatch:
        r"""Return the patch with one edit of each map that serves all positions at once, and all prompts of a batch:

        $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad \Delta W_\text{down} = \Delta H\, Y^+$$

        The rank is at most the number of positions. The edits come from one more run of the bare query. With
        ``formed``, this run rounds as a model with the matrices $V + \Delta V$ does, so each block corrects the
        rounding of those before it.

        Raises `ValueError`, with block and map, if the vectors of the positions are linearly dependent, or if a bias or
        a scale alone would have to serve several positions.
        """
        list(self._placed(model))  # all checks come before the run
        with experts_one_by_one(model, self.anatomy):
            blocks, _ = without_context(model, self.prompted, self.outer_kind, joint=True, formed=formed, keep=1)
        return replace(self, blocks=blocks, is_joint=True)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the ``with``, ``model(**patch.bare(ids))`` outputs what ``model(ids)`` outputs at the query.

        As in :meth:`icl_lib.patch.Patch.applied`, nothing is copied, no edit is formed as a matrix, and no parameter
        changes. Inside, a mixture of experts runs its experts one by one.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(experts_one_by_one(model, self.anatomy))
            for _, block, anatomy, edits in self._placed(model):
                apply_edits(stack, block, anatomy, edits)
            yield model

    def merged(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with edited weights: the same classes, no hooks, ready for ``save_pretrained``.

        With several positions, one edit of each map serves them all; see :meth:`joint`, also for the errors. With
        ``outer="bias"`` a map may get a bias that its class does not have. The copy uses this bias, but a model that is
        loaded from what ``save_pretrained`` wrote lacks it.
        """
        edits = self.joint(model, formed=True)
        merged = copy.deepcopy(model)
        with torch.no_grad():
            for where, block, _, patch in edits._placed(merged):
                for path, edit in patch.edits.items():
                    merge_edit(block, where, path, edit)
        return merged

    def to_lora(self, path: str | Path, model: nn.Module | None = None) -> Path:
        """Write the patch as an adapter that ``peft.PeftModel.from_pretrained(model, path)`` loads.

        By default ``model`` is the model that the patch was made from. The files are ``adapter_config.json`` and
        ``adapter_model.safetensors``; the edits are those of :meth:`joint`. The scale of a norm is saved in full,
        as one of PEFT's ``modules_to_save``.

        Raises `ValueError` as :meth:`merged` does, and for a patch with ``outer='bias'``: a LoRA adapter has no biases.
        """
        model = self.source() if model is None else model
        if model is None:
            raise ValueError(
                "the model of this patch no longer exists: give a model with the same weights, to_lora(path, model)."
            )
        mixture = (
            self.anatomy.router is not None
        )  # PEFT forms the edited matrices of experts, but not those of linear maps
        factors: dict[str, LowRank] = {}
        scales: dict[str, Tensor] = {}
        for index, (where, block, anatomy, patch) in enumerate(self.joint(model, formed=mixture)._placed(model)):
            prefix = f"{self.anatomy.blocks}.{index}."
            for name, edit in patch.edits.items():
                if isinstance(edit, LowRank):
                    factors[prefix + name] = edit
                elif name == anatomy.scale:
                    scales[prefix + name] = block.get_submodule(name).weight.detach() + edit
                else:
                    raise ValueError(
                        f"{where}.{name}: a LoRA adapter has no biases. Make the patch with absorb(..., outer='down')."
                    )
        return write_adapter(Path(path), model, factors, scales)

    def _placed(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Anatomy, LanguageBlockPatch]]:
        if anatomy_of(model) != self.anatomy:
            raise ValueError(
                f"model has another anatomy than {self.anatomy}: give the model that the patch was made from."
            )
        blocks = list(model.get_submodule(self.anatomy.blocks))
        if len(blocks) != len(self.blocks):
            raise ValueError(
                f"model has {len(blocks)} blocks and the patch {len(self.blocks)}: give the model of the patch."
            )
        for index, (block, patch) in enumerate(zip(blocks, self.blocks, strict=True)):
            where = f"{self.anatomy.blocks}[{index}]"
            for path, edit in patch.edits.items():
                weight = matrix_at(block, path) if isinstance(edit, LowRank) else vector_at(block, path)
                shape = edit.shape[-2:] if isinstance(edit, LowRank) else edit.shape[-1:]
                if (weight.shape, weight.dtype, weight.device) != (shape, edit.dtype, edit.device):
                    raise ValueError(
                        f"{where}.{path} holds {tuple(weight.shape)}, {weight.dtype} on {weight.device} and its edit "
                        f"is {tuple(shape)}, {edit.dtype} on {edit.device}: give the model that it was made from."
                    )
            yield where, block, self.anatomy.of(block), patch
