r"""The edits of a language model from two passes: one with the context, one without.

The MLP sublayer of a block is $h \mapsto h + \mathrm{MLP}(V_1 z, V_2 z, \dots)$, where $z$ is $h$ or a norm of it. The
first pass records $h_C$ and $z_C$ of every block. The second pass runs the bare query, reads $h_0$ and $z_0$ and edits

$$\Delta V = \frac{V (z_C - z_0) z_0^\top}{\lVert z_0 \rVert^2}, \qquad \Delta h = h_C - h_0 ,$$

for every linear map $V$ that reads $z$. The difference $\Delta h$ is added by a bias, $\Delta b' = \Delta h$, by the
last matrix, $\Delta W_\text{down} = \Delta h\, y^\top / \lVert y \rVert^2$, or by a norm after the MLP
(:mod:`icl_lib.output_updates`).
Each edit is computed when its weight is used and applied at once. So block $\ell$ reads the output of the edited blocks
before it, and the logits of the second pass are those of the edited model.

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

from icl_lib.environment import building_book
from icl_lib.language.block_patch import LanguageBlockPatch
from icl_lib.language.call import Call, run
from icl_lib.language.finder import Finder, Reading
from icl_lib.language.places import edited
from icl_lib.language.watch import on_output, on_stream
from icl_lib.measures import relative_error
from icl_lib.models.anatomy import anatomy_of
from icl_lib.report import TOLERANCE
from icl_lib.validation import require_finite


@dataclass(frozen=True, eq=False)
class Prompted:
    """A query, and what the blocks read at its tokens with the context.

    Attributes:
        bare: the call for the query alone.
        shape: the leading dimensions of the edits, ``[*batch, positions]``.
        readings: one for each block.
    """

    bare: Call
    shape: torch.Size
    readings: tuple[Reading, ...]


def with_context(
    model: nn.Module,
    call: Call,
    first: int,
    keep: int | None = None,
    visit: Callable[[], Any] = lambda: None,
    **options: Any,
) -> tuple[tuple[Reading, ...], Tensor]:
    """Run the whole prompt once; return what each block read from position ``first`` on, and the logits there.

    With ``keep``, only the logits of the last ``keep`` positions are computed. ``visit`` is called after each block.
    """
    anatomy, (rows, length) = anatomy_of(model), call["input_ids"].shape
    blocks = model.get_submodule(anatomy.blocks)
    readings = tuple(Reading() for _ in blocks)

    def note(where: str, reading: Reading, name: str, tokens: Tensor) -> None:
        if getattr(reading, name) is not None:
            raise ValueError(
                f"{where}: the module that the anatomy names as its {name} is called twice in one pass: correct the "
                "entry, see icl_lib.models.anatomy."
            )
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
            on_output(stack, block, lambda out, noted=noted: (noted("output", out), visit()))
        logits = run(model, call, keep or length - first, **options)
    for index, reading in enumerate(readings):
        if reading.stream is None or (reading.read is None and not anatomy.parallel):
            raise ValueError(
                f"{anatomy.blocks}[{index}]: the modules that the anatomy names as its stream and its first inner map "
                "are not both called: correct the entry, see icl_lib.models.anatomy."
            )
    require_finite("the model's logits", logits, "look for NaN in its weights; if it overflows, use a wider dtype.")
    return readings, logits.reshape(-1, logits.shape[-1])


def without_context(
    model: nn.Module,
    prompted: Prompted,
    outer: str,
    joint: bool = False,
    formed: bool = False,
    keep: int | None = None,
    edits: bool = True,
    require: bool = True,
    visit: Callable[[int, Tensor], Any] = lambda *_: None,
) -> tuple[tuple[LanguageBlockPatch, ...], Tensor]:
    """Run the bare query once and compute the edits during the pass; return them and the logits of the edited model.

    With ``joint``, one edit of each map serves all positions. With ``formed``, the pass uses the edited matrices
    themselves and rounds as a merged model does, so each block corrects the rounding of those before it. Without
    ``edits``, they are released block by block. ``visit`` is called with the number of each block and the stream after
    it, ``[tokens, width]``.

    With ``require``, raises `ValueError` at the first block whose output is not that of the run with the context: then
    the block computes something that its anatomy does not say, and the edits are never returned.
    """
    anatomy = anatomy_of(model)
    found: list[LanguageBlockPatch] = []
    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(model.get_submodule(anatomy.blocks)):
            where, reading = f"{anatomy.blocks}[{index}]", prompted.readings[index]
            finder = Finder(where, block, anatomy.of(block), reading, outer, joint, formed)
            finder.install(stack)

            def after(out: Tensor, index: int = index, finder: Finder = finder) -> None:
                out = out.reshape(-1, out.shape[-1])
                visit(index, out)
                if require:
                    wanted = prompted.readings[index].output
                    require_reproduced(f"{anatomy.blocks}[{index}]", out, wanted, joint, anatomy.scale is not None)
                patch = finder.edits(prompted.shape)
                if edits:
                    found.append(patch)
                finder.forget()

            on_output(stack, block, after)
        logits = run(model, prompted.bare, keep)
    return tuple(found), logits.reshape(-1, logits.shape[-1])


def require_reproduced(where: str, edited: Tensor, prompted: Tensor, joint: bool, rounded: bool) -> None:
    """Raise `ValueError` if a block with its edits does not output what it outputs with the context.

    The limit is a few times the tolerance of :func:`icl_lib.verification.verify`, wider where an edit that several
    positions share (``joint``) cannot correct a norm that computes in float32 (``rounded``).
    """
    off = float(relative_error(edited, prompted).max())
    tolerance = max(TOLERANCE[edited.dtype], TOLERANCE[torch.float32] if joint and rounded else 0.0)
    limit = tolerance * (10 if edited.dtype.itemsize > 2 else 2)
    if not off <= limit:
        remedy = (
            "No one edit serves all positions to this precision: give each position its own edits (Patch.applied), or "
            "take a shorter query or a wider dtype."
            if joint
            else "Either the block computes more than its anatomy says (a factor on a branch, another map with the "
            "same input, a hook), or the numbers are too ill-conditioned for this dtype."
        )
        raise ValueError(
            f"{where}: with its edits this block's output differs from that with the prompt by {off:.0e}, relatively; "
            f"rounding explains {limit:.0e}. {remedy}"
        )


def bar_over(blocks: int, passes: int, progress: bool) -> tqdm:
    """Return a progress bar that counts blocks, hidden unless ``progress`` is true, and while the book is built."""
    return tqdm(total=blocks * passes, unit="block", disable=not progress or building_book(), leave=False)
