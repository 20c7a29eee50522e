r"""Finds the edits of one block while the block runs with them.

Each edit is worked out when its weight is first used, from what the weight reads then and from what the block read with
the context; the weight answers as edited at once. So whatever comes behind it reads what the patched block makes.
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

from icl_lib.anatomy import Anatomy
from icl_lib.language.block_patch import LanguageBlockPatch
from icl_lib.language.places import edited, edited_experts, matrix_at, rescaled, split
from icl_lib.language.watch import on_stream
from icl_lib.low_rank import LowRank
from icl_lib.outer import output_update, scale_update, turning_update
from icl_lib.theorem import joint_weight_update, least_norm_edit, weight_update


@dataclass
class Reading:
    """What one block read and answered with the context, at the positions that get an edit: ``[tokens, width]``.

    Attributes:
        stream: $h_C$; in a parallel block the attention's answer, which is what the context changes.
        read: $z_C$; None in a parallel block.
        output: the stream after the block, where it is kept.
    """

    stream: Tensor | None = None
    read: Tensor | None = None
    output: Tensor | None = None


class Finder:
    """The edits of one block, as they are found.

    Args:
        where: what errors call the block.
        block, anatomy: the block and its places.
        reading: what it read with the context.
        outer: what takes the change of the stream: ``down``, ``bias`` or ``scale``.
        joint: whether one edit a map must serve all tokens.
        formed: whether the block runs with the edited matrices formed, as it will when they are merged.
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
        # In the order of the pass: h_C - h_0; which tokens go to each expert, as it reads them, and the sums of their
        # gates; what the norm behind the MLP shall answer, and with which gain.
        self.change: Tensor | None = None
        self.sent: dict[int, Tensor] = {}
        self.gates: Tensor | None = None
        self.turned: tuple[Tensor, Tensor] | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Let the block run with its edits until the stack is left."""
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
        """What was found, with the leading dimensions ``shape``."""
        if not self.found_outer or not set(self.anatomy.inner) <= {split(path)[0] for path in self.found_inner}:
            raise ValueError(f"{self.where}: not every map named in its anatomy is called: correct the entry.")

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
        """Release what was found, and what it was found from."""
        self.found_inner, self.found_outer, self.sent = {}, {}, {}
        self.change = self.gates = self.turned = None

    def _on_stream(self, tokens: Tensor) -> None:
        self.change = self.reading.stream - tokens.reshape(self.reading.stream.shape)

    def _on_read(self, path: str, read: Tensor, _: Tensor) -> LowRank:
        return self._inner(path, read, self.reading.read)

    def _on_routed(self, _: nn.Module, __: Any, answer: tuple[Tensor, Tensor, Tensor]) -> None:
        if not (isinstance(answer, tuple) and len(answer) == 3):
            raise ValueError(
                f"{self.where}.{self.anatomy.router} answers a {type(answer).__name__}: a router must answer (logits, "
                "gates, chosen experts), see icl_lib.anatomy."
            )
        _, gates, chosen = answer
        self.gates = gates.to(self.change.dtype).sum(-1, keepdim=True)
        self.sent = {expert: (chosen == expert).T.nonzero()[:, 1] for expert in chosen.unique().tolist()}

    def _on_expert_read(self, path: str, expert: int, read: Tensor, _: Tensor) -> LowRank:
        return self._inner(f"{path}[{expert}]", read, self.reading.read[self.sent[expert]])

    def _on_expert_hidden(self, expert: int, hidden: Tensor, _: Tensor) -> LowRank:
        tokens = self.sent[expert]
        return self._outer(f"{self.anatomy.outer}[{expert}]", self.change[tokens] / self.gates[tokens], hidden)

    def _on_hidden(self, hidden: Tensor, answer: Tensor) -> LowRank | Tensor:
        path = self.anatomy.outer
        if self.kind == "bias":
            self.found_outer[path] = self._one_vector(path, self.change)
            return self.found_outer[path]
        change = self.change
        if self.norm is not None:
            parts = parts_of(self.norm, answer)
            wanted = parts.answer + self.change
            change, gain = self._named(
                path, turning_update, wanted, answer, parts.normed, parts.gain, self.joint and len(answer) > 1
            )
            self.turned = wanted, gain
        return self._outer(path, change, hidden)

    def _on_norm(self, read: Tensor) -> Tensor:
        path = self.anatomy.scale
        parts = parts_of(self.norm, read.reshape(self.change.shape))
        if self.turned is None:  # the scale alone takes the change, and what the norm rounds off
            rest = self.change + parts.answer - parts.gain * parts.normed
            edit = self._named(path, scale_update, rest, parts.normed)
        else:
            wanted, gain = self.turned
            if gain.ndim > 1:
                # Turning has left rounding errors, those of a norm that computes in float32 among them.
                exact = wanted / parts.normed
                gain = torch.where((exact - gain).abs() < gain.abs() / 2, exact, gain)
            edit = gain - parts.gain
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
                f"{self.where}.{path}: {len(vectors)} positions need {len(vectors)} vectors, and it has one for all. "
                "Ask with a single token, give each position its own edits (Patch.applied), or absorb with "
                "outer='down'."
            )
        return vectors[0]

    def _named(self, path: str, formula: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return formula(*arguments)
        except ValueError as error:
            hint = (
                "A token that occurs twice reads the same where a map sees neither position nor context, as in the "
                "first block of a parallel architecture."
                if "independent" in str(error)
                else "Without the context the MLP reads a_without, and its last map hidden."
            )
            raise ValueError(f"{self.where}.{path}: {error} ({hint})") from None


class NormParts(NamedTuple):
    r"""A norm's answer $g \odot u$ and its parts: what it answers, $u$, and $g$, which is $m$ or $1 + m$."""

    answer: Tensor
    normed: Tensor
    gain: Tensor


def parts_of(norm: nn.Module, read: Tensor) -> NormParts:
    """The parts of a norm's answer, found by running it with scales of zero and one."""
    twin = copy.copy(norm)  # shares everything but its attributes' dictionary
    scale = norm._parameters["weight"].detach()

    def scaled_by(weight: Tensor) -> Tensor:
        vars(twin)["weight"] = weight
        return type(norm).forward(twin, read)

    base = scaled_by(torch.zeros_like(scale))
    offset = float(bool((base != 0).any()))
    return NormParts(scaled_by(scale), scaled_by(torch.ones_like(scale)) - base, scale + offset)
