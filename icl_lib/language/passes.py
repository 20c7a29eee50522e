r"""The prompt of a language model turned into weights: one pass with the context, one without.

A block's MLP sublayer is $h \mapsto h + g(f(h))$. With the context it reads $h_C$, and its linear maps read $z_C$.
Without the context, the patched model's own forward pass on the bare query reads $h_0$ and $z_0$, and

$$\Delta V = \frac{V (z_C - z_0) z_0^\top}{\lVert z_0 \rVert^2}, \qquad \Delta h = h_C - h_0 ,$$

for every linear map $V$ that reads $z$, while $\Delta h$ goes into what the architecture has: $\Delta b' = \Delta h$,
$\Delta W_\text{down} = \Delta h\, y^\top / \lVert y \rVert^2$, or a norm behind the MLP (:mod:`icl_lib.outer`). The
second pass finds each edit when the weight is first used and runs on with it, so that it is already the patched model's
answer: block $\ell$ is fed what the patched blocks before it have made.

Source: Goldwaser, Munn, Gonzalvo, Dherin, *Equivalence of Context and Parameter Updates in Modern Transformer Blocks*
(arXiv 2511.17864).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_lib.anatomy import anatomy_of
from icl_lib.environment import building_book
from icl_lib.language.block_patch import LanguageBlockPatch
from icl_lib.language.call import Call, run
from icl_lib.language.finder import Finder, Reading
from icl_lib.language.places import edited
from icl_lib.language.watch import on_output, on_stream
from icl_lib.validation import require_finite


@dataclass(frozen=True, eq=False)
class Prompted:
    """A query, and what the model made of it with the context.

    Attributes:
        bare: the query as the model is called with it.
        shape: the leading dimensions of edits, ``[*batch, positions]``.
        readings: of each block.
    """

    bare: Call
    shape: torch.Size
    readings: tuple[Reading, ...]


def with_context(
    model: nn.Module,
    call: Call,
    first: int,
    keep: int | None = None,
    outputs: bool = True,
    visit: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[tuple[Reading, ...], Tensor]:
    """Run the whole prompt once; gives what each block read from position ``first`` on, and the logits there.

    ``keep`` asks for the logits of the last so many positions only; ``outputs`` keeps the streams after the blocks;
    ``visit`` is called after each block.
    """
    anatomy, (rows, length) = anatomy_of(model), call["input_ids"].shape
    blocks = model.get_submodule(anatomy.blocks)
    readings = tuple(Reading() for _ in blocks)

    def note(where: str, reading: Reading, name: str, tokens: Tensor) -> None:
        if getattr(reading, name) is not None:
            raise ValueError(f"{where}: its {name} is read twice in a block: correct the entry, see icl_lib.anatomy.")
        tokens = tokens.detach().reshape(rows, length, -1)[:, first:]
        setattr(reading, name, tokens.reshape(-1, tokens.shape[-1]).clone())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, (block, reading) in enumerate(zip(blocks, readings, strict=True)):
            noted = functools.partial(note, f"{anatomy.blocks}[{index}]", reading)
            here = anatomy.of(block)
            on_stream(stack, block, here, functools.partial(noted, "stream"))
            if not here.parallel:
                reader = here.router or here.inner[0]
                stack.enter_context(edited(block, reader, lambda tokens, _, noted=noted: noted("read", tokens)))
            on_output(stack, block, lambda out, noted=noted: (outputs and noted("output", out), visit()))
        logits = run(model, call, keep or length - first, **options)
    for index, reading in enumerate(readings):
        if reading.stream is None or (reading.read is None and not anatomy.parallel):
            raise ValueError(
                f"{anatomy.blocks}[{index}]: its stream or its first inner map is never read: correct the entry, see "
                "icl_lib.anatomy."
            )
    require_finite("the model's logits", logits, "its weights hold NaN, or overflow: load them again.")
    return readings, logits.reshape(-1, logits.shape[-1])


def without_context(
    model: nn.Module,
    prompted: Prompted,
    outer: str,
    joint: bool = False,
    formed: bool = False,
    keep: int | None = None,
    edits: bool = True,
    visit: Callable[[int, Tensor], Any] = lambda *_: None,
) -> tuple[tuple[LanguageBlockPatch, ...], Tensor]:
    """Run the bare query once, finding the edits on the way; gives them, and the logits of the patched model.

    ``joint`` asks for one edit a map that serves all positions. ``formed`` runs with the edited matrices themselves, so
    that each block makes up for the rounding of those before it as it will be when they are merged. Without ``edits``
    they are forgotten block by block. ``visit`` is called with the number of each block and the stream after it,
    ``[tokens, width]``.
    """
    anatomy = anatomy_of(model)
    found: list[LanguageBlockPatch] = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(model.get_submodule(anatomy.blocks)):
            where, reading = f"{anatomy.blocks}[{index}]", prompted.readings[index]
            finder = Finder(where, block, anatomy.of(block), reading, outer, joint, formed)
            finder.install(stack)

            def after(out: Tensor, index: int = index, finder: Finder = finder) -> None:
                visit(index, out.reshape(-1, out.shape[-1]))
                patch = finder.edits(prompted.shape)
                if edits:
                    found.append(patch)
                finder.forget()

            on_output(stack, block, after)
        logits = run(model, prompted.bare, keep)
    return tuple(found), logits.reshape(-1, logits.shape[-1])


def bar_over(blocks: int, passes: int, progress: bool) -> tqdm:
    """A bar that counts blocks; none unless it is asked for, and none on the book's pages."""
    return tqdm(total=blocks * passes, unit="block", disable=not progress or building_book(), leave=False)
