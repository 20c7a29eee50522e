r"""Compute the edits of one block during its forward pass.

Each edit is computed when its weight is used, from the input of the weight then and from what the block read with the
context. The edit is applied at once, so everything after it in the block reads the output of the edited weight.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icl_lib.language.block_patch import LanguageBlockPatch
from icl_lib.language.places import edited, edited_experts, matrix_at, rescaled, split
from icl_lib.language.watch import on_stream
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import Anatomy
from icl_lib.output_updates import output_update, scale_update, turning_update
from icl_lib.theorem import joint_weight_update, least_norm_edit, weight_update


@dataclass
class Reading:
    """What one block read and output with the context, at the positions that get an edit: ``[tokens, width]``.

    Attributes:
        stream: $h_C$; in a parallel block the output of the attention, which is what the context changes.
        read: $z_C$; None in a parallel block.
        output: the stream after the block.
    """

    stream: Tensor | None = None
    read: Tensor | None = None
    output: Tensor | None = None


class Finder:
    """Computes the edits of one block.

    Args:
        where: the name of the block in error messages.
        block, anatomy: the block and the places of its parts.
        reading: what the block read with the context.
        outer: which weights add the change of the stream: ``down``, ``bias`` or ``scale``.
        joint: whether one edit of each map must serve all tokens.
        formed: whether the block runs with the edited matrices themselves, as a merged model does.
    """

    def __init__(
        self,
        where: str,
        block: nn.Module,
        anatomy: Anatomy,
        reading: Reading,
        outer: str,
        joint: bool = False,
        formed: bool = False,
    ) -> None:
        self.where, self.block, self.anatomy, self.reading = where, block, anatomy, reading
        self.kind, self.joint, self.formed = outer, joint, formed
        self.norm = block.get_submodule(anatomy.scale) if anatomy.scale else None
        self.found_inner: dict[str, LowRank] = {}
        self.found_outer: dict[str, LowRank | Tensor] = {}
        # Set in this order during the pass: h_C - h_0; the tokens of each expert, in the order in which it reads them;
        # the sum of the gates of each token; the wanted output of the norm after the MLP, and its new scale.
        self.change: Tensor | None = None
        self.sent: dict[int, Tensor] = {}
        self.gates: Tensor | None = None
        self.turned: tuple[Tensor, Tensor] | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Make the block run with its edits until the stack is closed."""
        block, here = self.block, self.anatomy
        on_stream(stack, block, here, self._on_stream)
        if here.router:
            stack.enter_context(edited(block, here.router, functools.partial(self._on_read, here.router), self.formed))
            stack.callback(block.get_submodule(here.router).register_forward_hook(self._on_routed).remove)
            for path in here.inner:
                stack.enter_context(
                    edited_experts(block, path, functools.partial(self._on_expert_read, path), self.formed)
                )
            stack.enter_context(edited_experts(block, here.outer, self._on_expert_hidden, self.formed))
            return
        for path in here.inner:
            stack.enter_context(edited(block, path, functools.partial(self._on_read, path), self.formed))
        if self.kind != "scale":
            stack.enter_context(edited(block, here.outer, self._on_hidden, self.formed))
        if self.norm is not None:
            stack.enter_context(rescaled(self.norm, self._on_norm))

    def edits(self, shape: torch.Size) -> LanguageBlockPatch:
        """Return the edits, with the leading dimensions ``shape``."""
        if not self.found_outer or not set(self.anatomy.inner) <= {split(path)[0] for path in self.found_inner}:
            raise ValueError(
                f"{self.where}: a map named in its anatomy is never called: correct the entry, see icl_lib.models.anatomy."
            )

        def shaped(path: str, edit: LowRank | Tensor) -> LowRank | Tensor:
            if split(path)[1] is not None or self.joint:
                return edit
            if isinstance(edit, Tensor):
                return edit.reshape(*shape, -1)
            return LowRank(*(factor.reshape(*shape, -1, 1) for factor in (edit.left, edit.right)))

        inner, outer = (
            {path: shaped(path, edit) for path, edit in part.items()} for part in (self.found_inner, self.found_outer)
        )
        return LanguageBlockPatch(inner, outer, self.change.reshape(*shape, -1), {} if self.joint else self.sent)

    def forget(self) -> None:
        """Release the edits and everything that was kept to compute them."""
        self.found_inner, self.found_outer, self.sent = {}, {}, {}
        self.change = self.gates = self.turned = None

    def _on_stream(self, tokens: Tensor) -> None:
        self.change = self.reading.stream - tokens.reshape(self.reading.stream.shape)

    def _on_read(self, path: str, read: Tensor, _: Tensor) -> LowRank:
        return self._inner(path, read, self.reading.read)

    def _on_routed(self, _: nn.Module, __: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if not (isinstance(output, tuple) and len(output) == 3):
            raise ValueError(
                f"{self.where}.{self.anatomy.router} returns a {type(output).__name__}: a router must return (logits, "
                "gates, chosen experts), see icl_lib.models.anatomy."
            )
        _, gates, chosen = output
        self.gates = gates.to(self.change.dtype).sum(-1, keepdim=True)
        self.sent = {expert: (chosen == expert).T.nonzero()[:, 1] for expert in chosen.unique().tolist()}

    def _on_expert_read(self, path: str, expert: int, read: Tensor, _: Tensor) -> LowRank:
        return self._inner(f"{path}[{expert}]", read, self.reading.read[self.sent[expert]])

    def _on_expert_hidden(self, expert: int, hidden: Tensor, _: Tensor) -> LowRank:
        tokens = self.sent[expert]
        return self._outer(f"{self.anatomy.outer}[{expert}]", self.change[tokens] / self.gates[tokens], hidden)

    def _on_hidden(self, hidden: Tensor, output: Tensor) -> LowRank | Tensor:
        path = self.anatomy.outer
        if self.kind == "bias":
            self.found_outer[path] = self._one_vector(path, self.change)
            return self.found_outer[path]
        change = self.change
        if self.norm is not None:
            parts = parts_of(self.norm, output)
            wanted = parts.output + self.change
            change, scale = self._named(
                path, turning_update, wanted, output, parts.normed, parts.scale, self.joint and len(output) > 1
            )
            self.turned = wanted, scale
        return self._outer(path, change, hidden)

    def _on_norm(self, read: Tensor) -> Tensor:
        path = self.anatomy.scale
        parts = parts_of(self.norm, read.reshape(self.change.shape))
        if self.turned is None:  # the scale alone takes the change and the rounding of the norm
            rest = self.change + parts.output - parts.scale * parts.normed
            edit = self._named(path, scale_update, rest, parts.normed)
        else:
            wanted, scale = self.turned
            if scale.ndim > 1:
                # Turning leaves rounding errors, among them those of a norm that computes in float32.
                exact = wanted / parts.normed
                scale = torch.where((exact - scale).abs() < scale.abs() / 2, exact, scale)
            edit = scale - parts.scale
        self.found_outer[path] = self._one_vector(path, edit)
        return self.found_outer[path]

    def _inner(self, path: str, read: Tensor, wanted: Tensor) -> LowRank:
        formula = joint_weight_update if self.joint else weight_update
        self.found_inner[path] = self._named(path, formula, matrix_at(self.block, path), read, wanted)
        return self.found_inner[path]

    def _outer(self, path: str, change: Tensor, hidden: Tensor) -> LowRank:
        arguments = (least_norm_edit, hidden, change) if self.joint else (output_update, change, hidden)
        self.found_outer[path] = self._named(path, *arguments)
        return self.found_outer[path]

    def _one_vector(self, path: str, vectors: Tensor) -> Tensor:
        if not self.joint or vectors.ndim == 1:
            return vectors
        if len(vectors) > 1:
            raise ValueError(
                f"{self.where}.{path}: {len(vectors)} positions need {len(vectors)} vectors, but a joint edit has only "
                "one. Use a query of one token, give each position its own edits (Patch.applied), or absorb with "
                "outer='down'."
            )
        return vectors[0]

    def _named(self, path: str, formula: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return formula(*arguments)
        except ValueError as error:
            hints = {
                "independent": "In the first block, equal tokens can give a map equal inputs.",
                "a_without": "a_without is the input of the MLP without the context.",
                "hidden": "hidden is the input of the last map.",
            }
            hint = next((f" ({said})" for name, said in hints.items() if name in str(error)), "")
            raise ValueError(f"{self.where}.{path}: {error}{hint}") from None


class NormParts(NamedTuple):
    r"""The output $\gamma \odot \bar o$ of a norm, $\bar o$, and $\gamma$, which in Gemma is 1 plus the parameter."""

    output: Tensor
    normed: Tensor
    scale: Tensor


def parts_of(norm: nn.Module, read: Tensor) -> NormParts:
    """Return the parts of a norm's output, found by running the norm with parameters of zero and one."""
    twin = copy.copy(norm)  # shares everything but its attributes' dictionary
    scale = norm._parameters["weight"].detach()

    def scaled_by(weight: Tensor) -> Tensor:
        vars(twin)["weight"] = weight
        return type(norm).forward(twin, read)

    base = scaled_by(torch.zeros_like(scale))
    offset = float(bool((base != 0).any()))
    return NormParts(scaled_by(scale), scaled_by(torch.ones_like(scale)) - base, scale + offset)
