r"""The edits of a model from two passes: one with the context, one without.

The MLP sublayer of a block is $h \mapsto h + \mathrm{MLP}(V_1 z, V_2 z, \dots)$, where $z$ is $h$ or a norm of it. The
first pass records $h_C$ and $z_C$ of every block (:mod:`icl_lib.models.activations`). The second pass runs the bare
query, reads $h_0$ and $z_0$ and edits

$$\Delta V = \frac{V (z_C - z_0) z_0^\top}{\lVert z_0 \rVert^2}, \qquad \Delta h = h_C - h_0 ,$$

for every linear map $V$ that reads $z$. The difference $\Delta h$ is added by a bias, $\Delta b' = \Delta h$, by the
last matrix, $\Delta W_\text{down} = \Delta h\, y^\top / \lVert y \rVert^2$, or by a norm after the MLP
(:mod:`icl_lib.output_updates`).
Each edit is computed when its weight is used and applied at once. So block $\ell$ reads the output of the edited blocks
before it, and the outputs of the second pass are those of the edited model.

Source: Goldwaser, Munn, Gonzalvo, Dherin, *Equivalence of Context and Parameter Updates in Modern Transformer Blocks*
(arXiv 2511.17864).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.measures import relative_error
from icl_lib.models.activations import CachedPrompt, on_output
from icl_lib.models.anatomy import Site
from icl_lib.models.block_edits import BlockEdits, Fit, NotReproducedError
from icl_lib.models.block_patch import BlockPatch
from icl_lib.models.report import TOLERANCE


def without_context(
    model: nn.Module,
    sites: Sequence[Site],
    prompt: CachedPrompt,
    outer: str,
    joint: bool = False,
    dense: bool = False,
    fit: Fit | None = None,
    keep: int | None = None,
    require: bool = True,
    visit: Callable[[int, Tensor, BlockEdits], Any] = lambda *_: None,
) -> Tensor:
    """Run the bare query once and compute the edits during the pass; return the outputs of the edited model.

    Args:
        joint: one edit of each map serves all positions.
        dense: the pass uses the edited matrices themselves and rounds as a merged model does, so each block corrects
            the rounding of those before it.
        fit: for joint edits, how they are fitted; None for exact ones.
        keep: the number of positions, from the last, whose outputs are computed; None for all.
        require: raise at the first block whose output is not that of the run with the context.
        visit: called after each block with its number, its output, ``[*batch, positions, width]``, and its edits.

    Raises :class:`~icl_lib.models.block_edits.NotReproducedError`, with the block, if its output with the edits is not
    that with the context.
    """
    blocks = [
        BlockEdits(site, prompt, seen, outer, joint, dense, fit)
        for site, seen in zip(sites, prompt.blocks, strict=True)
    ]

    def after(index: int, output: Tensor) -> Tensor | None:
        edits, wanted = blocks[index], prompt.blocks[index].output
        patched = prompt.of(output)
        edits.require_complete()
        if require:
            _require_reproduced(f"{edits.where}: with its edits this block's output", patched, wanted, [edits])
        visit(index, patched, edits)
        edits.forget()
        # A query that stands for all positions goes on alone.
        return output[..., -1:, :] if prompt.lead != prompt.bare_lead else None

    # Edits that are made in inference mode could not be used outside.
    with contextlib.ExitStack() as stack, torch.inference_mode(False), torch.no_grad():
        for index, edits in enumerate(blocks):
            edits.install(stack)
            on_output(stack, edits.block, functools.partial(after, index))
        outputs = prompt.kind.run(model, prompt.bare, keep)
    if require and prompt.output is not None:
        last = outputs.reshape(*prompt.output.shape[:-1], -1, outputs.shape[-1])[..., -1, :]
        _require_reproduced("with the edits of all blocks the model's output", last, prompt.output, blocks)
    return outputs


def edits_of(
    model: nn.Module,
    sites: Sequence[Site],
    prompt: CachedPrompt,
    outer: str,
    visit: Callable[[], Any] = lambda: None,
    **options: bool,
) -> tuple[BlockPatch, ...]:
    """Return the edits of all blocks; the options are those of :func:`without_context`."""
    found: list[BlockPatch] = []

    def note(_: int, __: Tensor, edits: BlockEdits) -> None:
        found.append(edits.patch())
        visit()

    without_context(model, sites, prompt, outer, keep=1, visit=note, **options)
    return tuple(found)


def _require_reproduced(what: str, patched: Tensor, prompted: Tensor, blocks: Sequence[BlockEdits]) -> None:
    """Raise an error if an output with the edits of these blocks is not that with the context.

    The limit is a few times the tolerance of a verification.
    """
    off = float(relative_error(patched, prompted).max())
    tolerance = max(tolerance_of(patched.dtype, edits) for edits in blocks)
    limit = tolerance * (10 if patched.dtype.itemsize > 2 else 2)
    if not off <= limit:
        raise NotReproducedError(
            f"{what} differs from that with the prompt by {off:.0e}, relatively; rounding explains {limit:.0e}."
        )


def tolerance_of(dtype: torch.dtype, edits: BlockEdits) -> float:
    """Return the relative error that rounding explains: that of the narrowest dtype in which the block computes.

    A norm computes in float32, which the edits do not correct if several positions share its scale.
    """
    shared = edits.joint and edits.kind == "down" and edits.norm is not None and edits.prompt.lead.numel() > 1
    return max(TOLERANCE[one] for one in (dtype, *edits.dtypes, *[torch.float32] * shared))


def bar_over(blocks: int, passes: int, progress: bool) -> tqdm:
    """Return a progress bar that counts blocks, hidden unless ``progress`` is true, and while the book is built."""
    return tqdm(total=blocks * passes, unit="block", disable=not progress or building_book(), leave=False)
