"""What the blocks of a model read and output with the context, recorded in one pass."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from icl_lib.models.anatomy import Anatomy, Site, is_experts
from icl_lib.models.edited_weights import edited, holder_of
from icl_lib.models.prompt import Call, Prompt, tokens_in
from icl_lib.validation import require_finite


@dataclass
class BlockActivations:
    """What one block read and output with the context, at the positions that get an edit: ``[*batch, positions, …]``.

    Attributes:
        stream: $h_C$; in a parallel block the output of the attention, which is what the context changes.
        reads: the input of each inner map, by its path: $z_C$, and one tensor if the maps read the same.
        output: the stream after the block.
        guard: what each map reads for texts that its edit should leave alone, ``[tokens, width]``: :func:`reads_of`.
    """

    stream: Tensor | None = None
    reads: dict[str, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    guard: dict[str, Tensor] = field(default_factory=dict)


class Rows(NamedTuple):
    """The tokens of a padded batch of bare queries to which edits are fitted, each beginning of a text once.

    Attributes:
        tokens: their numbers among all tokens of the batch, ``[rows]``.
        counts: how often each counts, ``[rows]``: in how many queries it occurs, the last tokens of queries more.
        of_token: for each token of the batch its row, or -1, ``[tokens]``.
    """

    tokens: Tensor
    counts: Tensor
    of_token: Tensor


@dataclass(frozen=True, eq=False)
class CachedPrompt:
    """A query, and what the blocks read at its positions with the context.

    Attributes:
        kind: how the model is called, a subclass of :class:`~icl_lib.models.prompt.Prompt`.
        bare: the call for the query alone.
        lead: the leading dimensions of the edits, ``[*batch, positions]``.
        bare_lead: those of the query; it has one position if a single query stands for all positions.
        blocks: the activations of each block.
        output: what the model outputs at the last position, ``[*batch, width]``; None if it is not compared.
        rows: for several queries, the tokens whose activations ``blocks`` holds; ``lead`` is then ``[rows]``.
    """

    kind: type[Prompt]
    bare: Call
    lead: torch.Size
    bare_lead: torch.Size
    blocks: tuple[BlockActivations, ...]
    output: Tensor | None
    rows: Rows | None = None

    def of(self, tokens: Tensor) -> Tensor:
        """Return tokens of a pass with the leading dimensions of the edits, or of the query if it stands for all."""
        if self.rows is not None:
            return tokens.reshape(-1, tokens.shape[-1])[self.rows.tokens]
        whole = tokens.numel() == self.lead.numel() * tokens.shape[-1]
        return tokens.reshape(*(self.lead if whole else self.bare_lead), tokens.shape[-1])


def with_context(
    model: nn.Module,
    sites: Sequence[Site],
    kind: type[Prompt],
    call: Call,
    lead: torch.Size,
    keep: int,
    visit: Callable[[], Any] = lambda: None,
    places: Tensor | None = None,
    **options: Any,
) -> tuple[tuple[BlockActivations, ...], Tensor]:
    """Run the whole prompt once; return what each block read at some positions, and the model's last outputs.

    Args:
        lead: the leading dimensions of what is kept, ``[*batch, positions]``.
        keep: the number of positions, from the last, whose outputs are computed.
        visit: called after each block.
        places: the positions, by default the last ones.
        options: arguments of the model.
    """
    found = tuple(BlockActivations() for _ in sites)
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for site, block in zip(sites, found, strict=True):
            _Recorder(site, block, lead, tokens_in(call), places).install(stack, visit)
        outputs = kind.run(model, call, keep, **options)
    for (where, _, anatomy), block in zip(sites, found, strict=True):
        missing = [path for path in anatomy.inner if path not in block.reads]
        missing += [anatomy.stream] * (block.stream is None) + [""] * (block.output is None)
        if missing:
            place = f"{where}.{missing[0]}".rstrip(".")
            raise ValueError(f"{place} is never called in a forward pass: correct the entry, see icl_lib.Anatomy.")
    _require_finite(model, sites, found, outputs)
    return found, outputs


def _require_finite(
    model: nn.Module, sites: Sequence[Site], found: Sequence[BlockActivations], outputs: Tensor
) -> None:
    """Require finite outputs; the error names a weight that is not finite, in the first block whose output is not."""
    if bool(outputs.isfinite().all()):
        return
    for (where, block, _), seen in zip(sites, found, strict=True):
        if not bool(seen.output.isfinite().all()):
            for name, parameter in block.named_parameters():
                require_finite(f"{where}.{name}", parameter, "load the weights again.")
            require_finite(
                f"the output of {where}", seen.output, "if its numbers are too large for the dtype, use a wider one."
            )
    for name, parameter in model.named_parameters():
        require_finite(f"model.{name}", parameter, "load the weights again.")
    require_finite("the model's output", outputs, "if its numbers are too large for the dtype, use a wider one.")


def reads_of(
    model: nn.Module, sites: Sequence[Site], kind: type[Prompt], calls: Sequence[Call]
) -> tuple[dict[str, Tensor], ...]:
    """Run some calls; return what each map of each block reads for all their tokens, ``[tokens, width]``, by its path.

    A path of experts ends in the number of the expert.
    """
    found = tuple(defaultdict(list) for _ in sites)

    def see(reads: dict[str, list[Tensor]], path: str, *given: Any) -> None:
        *expert, product = given
        reads[path + "".join(f"[{number}]" for number in expert)].append(product.read.detach().flatten(0, -2).clone())

    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for (where, block, anatomy), reads in zip(sites, found, strict=True):
            for path in (*anatomy.inner, *([anatomy.outer] if anatomy.outer else [])):
                stack.enter_context(edited(where, block, path, functools.partial(see, reads, path)))
        for call in calls:
            kind.run(model, call, 1)
    return tuple({path: torch.cat(parts) for path, parts in reads.items()} for reads in found)


def joined(parts: Sequence[BlockActivations]) -> BlockActivations:
    """Return the activations of several passes, token after token; maps that share what they read still do."""
    whole: dict[int, Tensor] = {}

    def all_of(activations: list[Tensor]) -> Tensor:
        key = id(activations[-1])
        if key not in whole:
            whole[key] = torch.cat(activations, dim=-2)
        return whole[key]

    return BlockActivations(
        all_of([part.stream for part in parts]),
        {path: all_of([part.reads[path] for part in parts]) for path in parts[-1].reads},
        all_of([part.output for part in parts]),
    )


class _Recorder:
    """Records the activations of one block."""

    def __init__(
        self, site: Site, found: BlockActivations, lead: torch.Size, tokens: int, places: Tensor | None
    ) -> None:
        self.site, self.found, self.lead, self.tokens, self.places = site, found, lead, tokens, places
        self.last: tuple[Tensor, Tensor] | None = None  # a tensor that was recorded, and what was kept of it

    def install(self, stack: contextlib.ExitStack, visit: Callable[[], Any]) -> None:
        where, block, anatomy = self.site
        on_stream(stack, block, anatomy, self._on_stream)
        for path in anatomy.inner:
            if is_experts(block, path):
                on_input(stack, holder_of(block, path)[0], functools.partial(self._on_read, path))
            else:  # without an edit, the weight only tells what it is multiplied with
                stack.enter_context(
                    edited(where, block, path, lambda product, path=path: self._on_read(path, product.read))
                )
        on_output(stack, block, self._on_output)
        stack.callback(block.register_forward_hook(lambda *_: visit() and None).remove)

    def _on_stream(self, tokens: Tensor) -> None:
        self._once(self.site.anatomy.stream, self.found.stream)
        self.found.stream = self._kept(self.site.anatomy.stream, tokens)

    def _on_read(self, path: str, tokens: Tensor) -> None:
        self._once(path, self.found.reads.get(path))
        self.found.reads[path] = self._kept(path, tokens)

    def _on_output(self, tokens: Tensor) -> None:
        self._once("", self.found.output)
        self.found.output = self._kept("", tokens)

    def _once(self, path: str, before: Tensor | None) -> None:
        if before is not None:
            place = f"{self.site.where}.{path}".rstrip(".")
            raise ValueError(
                f"{place} is called twice in one pass, but each call would need its own edit: correct the entry, see "
                "icl_lib.Anatomy."
            )

    def _kept(self, path: str, tokens: Tensor) -> Tensor:
        """Return a copy of the positions; maps that read one tensor share the copy."""
        if tokens.numel() != self.tokens * tokens.shape[-1]:
            place = f"{self.site.where}.{path}".rstrip(".")
            raise ValueError(
                f"{place} reads or returns {tuple(tokens.shape)} for {self.tokens} tokens: only streams with one "
                "vector for each token are covered."
            )
        if self.last is not None and same_memory(self.last[0], tokens):
            return self.last[1]
        batch, positions = self.lead[:-1], self.lead[-1]
        rows = tokens.detach().reshape(*batch, -1, tokens.shape[-1])
        kept = rows[..., -positions:, :].clone() if self.places is None else rows[..., self.places, :]
        self.last = tokens, kept
        return kept


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are one, up to their leading dimensions, and unchanged since the first was seen."""
    one = a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.shape[-1] == b.shape[-1]
    return one and a._version == b._version


def on_stream(stack: contextlib.ExitStack, block: nn.Module, anatomy: Anatomy, see: Callable[[Tensor], Any]) -> None:
    """Call ``see`` with $h$ (in a parallel block, with the output of the attention) until the stack is closed."""
    place = block.get_submodule(anatomy.stream)
    (on_output if anatomy.parallel else on_input)(stack, place, lambda tokens: see(tokens) and None)


def on_input(stack: contextlib.ExitStack, module: nn.Module, see: Callable[[Tensor], Any]) -> None:
    """Call ``see`` with the first tensor that the module reads, until the stack is closed."""

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(first_tensor((*args, *kwargs.values())))

    stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)


def on_output(stack: contextlib.ExitStack, module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> None:
    """Call ``see`` with the tensor that the module outputs, until the stack is closed; what it returns replaces it."""

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        changed = see(first_tensor(output))
        if changed is None or isinstance(output, Tensor):
            return changed
        return (changed, *output[1:])

    stack.callback(module.register_forward_hook(after).remove)


def first_tensor(value: Any) -> Tensor:
    """Return the tensor itself, or the first one of a tuple."""
    if isinstance(value, Tensor):
        return value
    found = (
        next((part for part in value if isinstance(part, Tensor)), None) if isinstance(value, (tuple, list)) else None
    )
    if found is None:
        raise ValueError(
            f"a block or one of its parts reads or returns a {type(value).__name__} without a tensor: only blocks that "
            "pass on the stream, alone or as the first part of a tuple, are covered."
        )
    return found
