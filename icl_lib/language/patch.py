r"""The edits of a language model that replace its prompt: hooked in as factors, merged, or saved as an adapter."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from icl_lib.anatomy import Anatomy, anatomy_of
from icl_lib.language.adapter import write_adapter
from icl_lib.language.block_patch import LanguageBlockPatch, apply_edits, merge_edit
from icl_lib.language.call import Call, bare_call, experts_one_by_one
from icl_lib.language.passes import Prompted, without_context
from icl_lib.language.places import matrix_at, vector_at
from icl_lib.low_rank import LowRank
from icl_lib.patch import Patch


@dataclass(frozen=True, eq=False)
class LanguagePatch(Patch):
    """What a prompt does to a language model, as edits of its weights; made by :func:`icl_lib.absorb.absorb`.

    Attributes:
        blocks: the edits, block by block.
        anatomy, reference, first, context_length: as in :class:`~icl_lib.patch.Patch`.
        outer_kind: what takes the change of the stream: ``down``, ``bias`` or ``scale``.
        prompted: the query, and what the blocks read with the context: what a joint patch is made from.
        is_joint: whether one edit a map serves all positions.
        source: gives the model that the patch was made from, as long as there is one.
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

    def bare(self, inputs: Tensor) -> Call:
        """What the patched model is fed in place of token ids ``[*batch, n]``: ``model(**patch.bare(ids))``.

        The ids without their context and the positions that they had: reference ``query`` gives ``[batch, m]``,
        reference ``self`` each token as a sequence of its own, ``[batch · positions, 1]``.
        """
        return bare_call(inputs, self.context_length, self.reference, self.first)

    def at_query(self) -> LanguagePatch:
        """Itself for reference ``query``, which has edits for no other position."""
        if self.first != self.context_length:
            raise ValueError("this patch has edits for all positions: absorb with positions='query'.")
        return self

    def joint(self, model: nn.Module, formed: bool = False) -> LanguagePatch:
        r"""The same patch as one edit a map that serves all positions at once (and all prompts of a batch).

        $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad \Delta W_\text{down} = \Delta H\, Y^+$$

        of rank at most the number of positions, from one more run of the bare query. With ``formed`` this run rounds as
        a model with the matrices $V + \Delta V$ does, so that each block makes up for the rounding of those before it.
        Raises `ValueError` where the vectors of the positions are linearly dependent, or where a bias or a scale alone
        would have to serve several, naming block and map.
        """
        list(self._placed(model))  # all checks come before the run
        with experts_one_by_one(model, self.anatomy):
            blocks, _ = without_context(model, self.prompted, self.outer_kind, joint=True, formed=formed, keep=1)
        return replace(self, blocks=blocks, is_joint=True)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the ``with``, ``model(**patch.bare(ids))`` answers what ``model(ids)`` answers with the context.

        As :meth:`icl_lib.patch.Patch.applied`: nothing is copied, no edit is formed as a matrix, and no parameter is
        touched. A mixture of experts runs its experts one by one inside.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(experts_one_by_one(model, self.anatomy))
            for _, block, anatomy, edits in self._placed(model):
                apply_edits(stack, block, anatomy, edits)
            yield model

    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of the model with edited weights: the same classes, no hooks, ready for ``save_pretrained``.

        With several positions, one edit a map serves them all; see :meth:`joint`, also for the errors. With
        ``outer="bias"`` a map gets a bias that its class may not know: the copy answers with it, but loading what
        ``save_pretrained`` has written leaves it out.
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

        ``model`` is by default the one that the patch was made from.

        The folder gets ``adapter_config.json`` and ``adapter_model.safetensors``; the edits are those of :meth:`joint`.
        A norm's scale is saved in full beside the low-rank factors, as one of PEFT's ``modules_to_save``.

        Raises `ValueError` as :meth:`merged` does, and for a patch that lets a bias take the change: a bias is no LoRA,
        so absorb with ``outer='down'``.
        """
        model = self.source() if model is None else model
        if model is None:
            raise ValueError("the model that this patch was made from is gone: give to_lora(path, model) one like it.")
        mixture = self.anatomy.router is not None  # whose matrices PEFT forms, and those of linear maps it does not
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
                        f"{where}.{name}: a bias is no LoRA. Make the patch with absorb(..., outer='down')."
                    )
        return write_adapter(Path(path), model, factors, scales)

    def _placed(self, model: nn.Module) -> Iterator[tuple[str, nn.Module, Anatomy, LanguageBlockPatch]]:
        if anatomy_of(model) != self.anatomy:
            raise ValueError(
                f"model keeps its parts in other places than {self.anatomy}: patch the model it came from."
            )
        blocks = list(model.get_submodule(self.anatomy.blocks))
        if len(blocks) != len(self.blocks):
            raise ValueError(
                f"model has {len(blocks)} blocks and the patch {len(self.blocks)}: patch the model it came from."
            )
        for index, (block, patch) in enumerate(zip(blocks, self.blocks, strict=True)):
            where = f"{self.anatomy.blocks}[{index}]"
            for path, edit in patch.edits.items():
                weight = matrix_at(block, path) if isinstance(edit, LowRank) else vector_at(block, path)
                shape = edit.shape[-2:] if isinstance(edit, LowRank) else edit.shape[-1:]
                if (weight.shape, weight.dtype, weight.device) != (shape, edit.dtype, edit.device):
                    raise ValueError(
                        f"{where}.{path} holds {tuple(weight.shape)}, {weight.dtype} on {weight.device} and its edit "
                        f"is {tuple(shape)}, {edit.dtype} on {edit.device}: patch the model it is from."
                    )
            yield where, block, self.anatomy.of(block), patch
