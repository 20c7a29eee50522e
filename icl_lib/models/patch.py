r"""The edits that replace a context in a whole model: applied as factors, merged, or saved as an adapter.

:func:`icl_lib.models.absorb.absorb` computes them.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from icl_lib.low_rank import LowRank
from icl_lib.models.activations import CachedPrompt
from icl_lib.models.anatomy import Anatomy, Site, known_anatomy, sites
from icl_lib.models.block_edits import NotReproducedError
from icl_lib.models.block_patch import BlockPatch
from icl_lib.models.edited_weights import parameter_at, split
from icl_lib.models.lora import require_free, write_adapter
from icl_lib.models.passes import edits_of
from icl_lib.models.prompt import Call, Prompt, experts_one_by_one
from icl_lib.models.streams import Stream

NO_JOINT_EDIT = (
    "No one edit serves all positions to this precision: give each position its own edits (Patch.applied), or take a "
    "shorter query or a wider dtype."
)


def _no_model() -> None:
    """Return no model: what a patch that was loaded from a file knows of the model that it was made from."""


@dataclass(frozen=True, eq=False)
class Patch:
    """The weight edits that replace a context in a model; made by :func:`icl_lib.models.absorb.absorb`.

    Attributes:
        blocks: the edits, block by block.
        anatomy: the places of the edited maps in the model.
        prompt: how the model is called with the context and without it.
        outer_kind: which weights add the change of the stream: ``down``, ``bias`` or ``scale``.
        cached: the query and what the blocks read with the context; a joint patch is computed from it. None for a patch
            whose edits are final.
        is_joint: whether one edit of each map serves all positions.
        source: returns the model that the patch was made from, or None if it no longer exists.

    It prints in one line: what it replaces, how many blocks it edits, and the edits of the first block:

    >>> from icl_lib import Transformer, TransformerConfig, absorb
    >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2, norm="pre")).double()
    >>> str(absorb(model, torch.randn(9, 4).double(), context_length=7)).split("; ")[0]
    'Patch(replaces 7 tokens of 1 prompt at 2 positions in 3 blocks'
    """

    blocks: tuple[BlockPatch, ...]
    anatomy: Anatomy
    prompt: Prompt
    outer_kind: str
    cached: CachedPrompt | None
    is_joint: bool
    source: Callable[[], nn.Module | None]

    def __repr__(self) -> str:
        def counted(number: int, what: str) -> str:
            return f"{number} {what}{'' if number == 1 else 's'}"

        block = self.blocks[0]
        *batch, positions = block.change.shape[:-1]
        return (
            f"Patch(replaces {counted(self.context_length - self.keep, 'token')} of "
            f"{counted(math.prod(batch), 'prompt')}{f', behind {self.keep} kept,' * bool(self.keep)} at "
            f"{counted(positions - self.keep, 'position')} in {counted(len(self.blocks), 'block')}"
            f"{', with one edit for all positions' if self.is_joint else ''}; {self.anatomy.blocks}[0]: "
            f"{block._listed()}; {block.change.dtype} on {block.change.device})"
        )

    def __reduce__(self) -> tuple:
        # A weak reference cannot be pickled, and the model is not part of the patch.
        kept = (_no_model if field.name == "source" else getattr(self, field.name) for field in fields(self))
        return type(self), tuple(kept)

    @property
    def reference(self) -> str:
        """The input of the patched blocks, ``query`` or ``self``."""
        return self.prompt.reference

    @property
    def first(self) -> int:
        """The first position in the sequence that has an edit."""
        return self.prompt.first

    @property
    def context_length(self) -> int:
        """The number of tokens of the context."""
        return self.prompt.context_length

    @property
    def keep(self) -> int:
        """The number of first tokens that stay in front of the query; the patch replaces the rest of the context."""
        return self.prompt.keep

    def bare(self, inputs: Tensor) -> Call:
        """Return the call of the edited model that replaces ``inputs``.

        For a float stream ``[*batch, n, dim]``, the call is ``model(patch.bare(inputs))``: with reference ``query`` the
        tokens after the context, ``[*batch, m, dim]``; with reference ``self`` each token as a sequence of its own,
        ``[*batch, positions, 1, dim]``. For token ids ``[*batch, n]`` it is ``model(**patch.bare(ids))``: the ids
        without their context, and their positions if the model takes them, ``[batch, m]``; with reference ``self``
        ``[batch · positions, 1]``. Kept tokens stay in front, and the call has a mask of ones.
        """
        return self.prompt.bare(inputs)

    def joint(self, model: nn.Module, dense: bool = False) -> Patch:
        r"""Return the patch with one edit of each map that serves all positions at once, and all prompts of a batch:

        $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad \Delta W_\text{down} = \Delta H\, Y^+$$

        The rank is at most the number of positions. The edits come from one more run of the bare query. With
        ``dense``, this run rounds as a model with the matrices $V + \Delta V$ does, so each block corrects the
        rounding of those before it.

        Raises `ValueError`, with block and map, if the vectors of the positions are linearly dependent, if a bias or a
        scale alone would have to serve several positions, and if a single query stands for all positions.
        """
        if self.cached.lead != self.cached.bare_lead:
            raise ValueError(
                "this patch turns a single query into every position, which no joint edit does: make the patch with "
                "positions='query'."
            )
        placed = self._placed(model)
        try:
            with experts_one_by_one(model):
                blocks = edits_of(model, placed, self.cached, self.outer_kind, joint=True, dense=dense)
        except NotReproducedError as error:
            raise ValueError(f"{error} {NO_JOINT_EDIT}") from None
        return replace(self, blocks=blocks, is_joint=True)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Patch the model inside the ``with``: on the bare query it outputs what it outputs with the context.

        The model is not copied, the edits are never formed as matrices, and no parameter changes. On leaving, also by
        an exception, the model is restored. Other threads see the patched model too, and copies made inside are
        patched. Inside, a mixture of experts runs its experts one by one.

        Raises `ValueError` for a model with another anatomy or other sizes, for a model that is already patched, and,
        inside, for inputs of another shape than the patch was made for. Other weights of the same size are not noticed.

        >>> from icl_lib import Transformer, TransformerConfig, absorb
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2, norm="pre")).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> patch = absorb(model, inputs, context_length=8)
        >>> with patch.applied(model):
        ...     output = model(patch.bare(inputs))
        >>> torch.allclose(output, model(inputs)[8:], rtol=1e-12)
        True
        """
        placed = self._placed(model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(experts_one_by_one(model))
            for site, edits in zip(placed, self._of_query(), strict=True):
                stack.enter_context(edits.applied(site.block, site.anatomy, site.where))
            yield model

    def merged(self, model: nn.Module) -> nn.Module:
        """Return a copy of the model with edited weights: the same classes, no hooks, ready for ``save_pretrained``.

        With several positions, one edit of each map serves them all; see :meth:`joint`, also for the errors. For a
        float stream, the maps instead hold a full matrix for each batch entry and position. With ``outer="bias"`` a map
        may get a bias that its class does not have. The copy uses this bias, but a model that is loaded from what
        ``save_pretrained`` wrote lacks it.

        >>> from icl_lib import Transformer, TransformerConfig, absorb
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2)).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> patch = absorb(model, inputs, context_length=8)
        >>> torch.allclose(patch.merged(model)(patch.bare(inputs)), model(inputs)[8:], rtol=1e-12)
        True
        """
        if self.is_stream and not self.is_joint:
            edits = self._of_query()
            single = edits[0].change.shape[:-1].numel() == 1
        else:
            edits, single = self.joint(model, dense=True).blocks, True
        self._placed(model)
        merged = copy.deepcopy(model)
        with torch.no_grad():
            for site, patch in zip(sites(merged, self.anatomy), edits, strict=True):
                if single:
                    patch.add_to(site.block, site.where)
                else:
                    patch.add_batched(site.block, each_alone=self.reference == "self")
        return merged

    @property
    def is_stream(self) -> bool:
        """Whether the patch is for a float stream."""
        return isinstance(self.prompt, Stream)

    def to_lora(self, path: str | Path, model: nn.Module | None = None, *, overwrite: bool = False) -> Path:
        """Write the patch as an adapter that ``peft.PeftModel.from_pretrained(model, path)`` loads.

        By default ``model`` is the model that the patch was made from. The files are ``adapter_config.json``,
        ``adapter_model.safetensors`` and a ``README.md`` that says for which queries the adapter is good. The edits are
        those of :meth:`joint`. The scale of a norm is saved in full, as one of PEFT's ``modules_to_save``.

        Args:
            path: a folder; it is created if it is missing, and must be empty otherwise.
            model: the model, if that of the patch no longer exists.
            overwrite: write into a folder that is not empty, over an earlier adapter; other files in it are kept.

        Raises `ValueError` as :meth:`joint` does, and for a patch with ``outer='bias'``: a LoRA adapter has no biases.
        A folder that holds a model is refused, and without ``overwrite`` one that holds any file, before the edits are
        computed.
        """
        model = self.source() if model is None else model
        if model is None:
            raise ValueError(
                "the model of this patch no longer exists: give a model with the same weights, to_lora(path, model)."
            )
        require_free("path", Path(path), overwrite)
        # PEFT forms the edited matrices of experts, but not those of linear maps.
        mixture = any(block.sent for block in self.blocks)
        factors: dict[str, LowRank] = {}
        scales: dict[str, Tensor] = {}
        patch = self.joint(model, dense=mixture)
        for index, (site, edits) in enumerate(zip(patch._placed(model), patch.blocks, strict=True)):
            prefix = f"{self.anatomy.blocks}.{index}."
            for name, edit in edits.edits.items():
                if isinstance(edit, LowRank):
                    factors[prefix + name] = edits.stored(name, edit) if "[" in name else edit
                elif name == site.anatomy.scale:
                    scales[prefix + name] = parameter_at(site.block, name) + edit
                else:
                    raise ValueError(
                        f"{site.where}.{name}: a LoRA adapter has no biases. Make the patch with absorb(..., "
                        "outer='down')."
                    )
        return write_adapter(Path(path), model, factors, scales, self._use(), overwrite)

    def _use(self) -> str:
        """Return for which queries an adapter of this patch is good, and how they are given."""
        start, end = self.context_length, self.prompt.length
        stay = f", except for the first {self.keep}, which stay in front," * bool(self.keep)
        return (
            f"It replaces the first {start} tokens of a prompt{stay} for the {end - start} tokens after them, exactly. "
            f"Give these at their own positions, {start} to {end - 1}. It is not made for other queries, nor for text "
            "that goes on after this one: icl_lib.compile_prompt makes such adapters, from many queries."
        )

    def _of_query(self) -> tuple[BlockPatch, ...]:
        """Return the edits for a run of the whole network: those of the query, if it stands for all positions."""
        if self.cached.lead == self.cached.bare_lead:
            return self.blocks
        rows = self.cached.bare_lead[-1]
        return tuple(block.at(slice(-rows, None)) for block in self.blocks)

    def _placed(self, model: nn.Module) -> tuple[Site, ...]:
        """Return the blocks of the model, after checking that the edits fit them."""
        known = known_anatomy(model)
        if known not in (None, self.anatomy):
            raise ValueError(
                f"model has the anatomy {known} and the patch was made for {self.anatomy}: give the model that the "
                "patch was made from."
            )
        placed = sites(model, self.anatomy)
        if len(placed) != len(self.blocks):
            raise ValueError(
                f"model has {len(placed)} blocks and the patch {len(self.blocks)}: give the model that the patch was "
                "made from."
            )
        for (where, block, _), patch in zip(placed, self.blocks, strict=True):
            for path, edit in patch.edits.items():
                weight = parameter_at(block, path)
                have = weight.mT.shape if split(path)[0] in patch.transposed else weight.shape
                shape = edit.shape[-2:]
                if isinstance(edit, Tensor):
                    have, shape = have[:1], edit.shape[-1:]
                if (have, weight.dtype, weight.device) != (shape, edit.dtype, edit.device):
                    raise ValueError(
                        f"{where}.{path} is {tuple(have)}, {weight.dtype} on {weight.device} and its edit is "
                        f"{tuple(shape)}, {edit.dtype} on {edit.device}: give the model that the patch was made from."
                    )
        return placed
