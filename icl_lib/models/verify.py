r"""Check the identity for a model and a prompt: an error for every block and position, with its control.

The check runs the model three times: with the context; on the bare query, at up to :data:`CONTROLS` positions; and on
the bare query with edited weights. The edits are kept as factors: an edited linear map outputs
$W z + L (R^\top z)$, and :meth:`icl_lib.models.patch.Patch.merged` computes the matrix $W + L R^\top$. The activation
with the context is used only to compute an edit; it is never given to the MLP.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.measures import relative_error, wide
from icl_lib.models.absorb import anatomy_of, cache, cause_of, outer_of, prompt_of
from icl_lib.models.activations import CachedPrompt, on_output
from icl_lib.models.anatomy import Site, sites
from icl_lib.models.block_edits import BlockEdits
from icl_lib.models.passes import bar_over, tolerance_of, without_context
from icl_lib.models.patch import NO_JOINT_EDIT
from icl_lib.models.prompt import Prompt, experts_one_by_one
from icl_lib.models.report import Report

CONTROLS = 32
"""The number of positions of a prompt at which the model is also run without edits."""


def verify(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str = "query",
    positions: str | None = None,
    tolerance: float | None = None,
    outer: str | None = None,
    joint: bool = False,
    progress: bool = False,
    attention_mask: Tensor | None = None,
    keep: int = 0,
) -> Report:
    r"""Check the identity in every block and at every position of a model, on a batch of prompts.

    $$T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x)$$

    Source: Innocenti and Achour (arXiv 2512.11255, version 1), Theorem 1. The model is run as a whole on the bare
    query, with its own forward pass. After each block, its stream is compared with that of the run with the context,
    and at the end the model's output. Where a single query stands for all positions, it alone goes on to the next
    block.

    Args:
        model, inputs, context_length, reference, positions, outer, joint, progress, attention_mask, keep: as for
            :func:`icl_lib.models.absorb.absorb`. The report leaves out the kept tokens, which read no others with the
            context than without.
        tolerance: the largest relative error for which :attr:`icl_lib.models.report.Report.holds` is true. By default
            1e-12 for float64, 1e-5 for float32, and eight rounding errors in 16 bits: 8e-3 for float16 and 6e-2 for
            bfloat16. It is at least 1e-5 where a part of the model computes in float32 that the edits cannot correct.

    Raises `ValueError` as :func:`icl_lib.models.absorb.absorb` does, but not for a failed identity: the report says so.
    As in :func:`icl_lib.theorem.weight_update`, precision is lost where the activation without the context is much
    longer than the one with it.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=8, blocks=3, heads=2, norm="pre")).double()
    >>> report = verify(model, torch.randn(4, 10, 8).double(), context_length=9)
    >>> report.holds, min(map(min, report.control)) > 1e-3
    (True, True)
    """
    if tolerance is not None and not (type(tolerance) in (int, float) and tolerance > 0):
        raise ValueError(f"tolerance is {tolerance!r}: give a positive number, such as 1e-12.")
    prompt = prompt_of(model, inputs, context_length, reference, positions, joint, attention_mask, keep)
    anatomy = anatomy_of(model, inputs)
    placed = sites(model, anatomy)
    outer = outer_of(placed, outer, prompt, joint, model)
    error: list[list[float]] = []
    squared: list[float] = []
    tolerances: list[float] = []

    with bar_over(len(placed), 3, progress) as bar, experts_one_by_one(model):
        rows = prompt.bare_lead[-1] - keep
        cached, outputs = cache(model, placed, prompt, inputs, keep=rows, visit=bar.update)
        outputs = outputs.reshape(*cached.bare_lead[:-1], rows, outputs.shape[-1])
        control, output_control = _without_edits(model, placed, prompt, cached, outputs, bar.update)

        def note(index: int, patched: Tensor, edits: BlockEdits) -> None:
            wanted, patched = cached.blocks[index].output[..., keep:, :], patched[..., keep:, :]
            error.append(_by_prompt(patched, wanted).amax(0).tolist())
            squared.append((patched - wanted).to(wide(patched)).square().mean().item())
            tolerances.append(tolerance_of(patched.dtype, edits))
            bar.update()

        edited = without_context(model, placed, cached, outer, joint, require=False, visit=note)
    report = Report(
        model=type(model).__name__,
        reference=reference,
        context_length=context_length,
        keep=keep,
        first=prompt.first,
        prompts=cached.lead[:-1].numel(),
        dtype=str(outputs.dtype).removeprefix("torch."),
        device=str(outputs.device),
        versions={"torch": torch.__version__} | _transformers(model),
        error=error,
        control=control,
        mean_squared_difference=squared,
        output_error=relative_error(_last(edited, outputs), outputs).max().item(),
        output_control=output_control,
        tolerance=max(tolerances),
    )
    if not report.holds:
        report = replace(report, cause=NO_JOINT_EDIT if joint else cause_of(model, inputs, anatomy))
    return report if tolerance is None else replace(report, tolerance=float(tolerance))


def _without_edits(
    model: nn.Module,
    placed: Sequence[Site],
    prompt: Prompt,
    cached: CachedPrompt,
    outputs: Tensor,
    visit: Callable[[], Any],
) -> tuple[list[list[float]], float]:
    """Return the errors of the model on the bare query: after each block at some positions, and of its outputs.

    For the outputs, the positions of the context are left out.
    """
    batch, positions = cached.bare_lead[:-1], cached.bare_lead[-1]
    some, call = torch.arange(positions), cached.bare
    if prompt.reference == "self" and positions > CONTROLS:  # each position is a sequence of its own
        some = torch.linspace(0, positions - 1, CONTROLS).round().long()
        call = prompt.at(call, batch, some)
    control: list[list[float]] = []

    def note(index: int, output: Tensor) -> None:
        wanted = cached.blocks[index].output
        wanted = wanted if cached.lead != cached.bare_lead else wanted[..., some.to(wanted.device), :]
        off = _by_prompt(output.reshape(*batch, len(some), -1), wanted)[:, prompt.keep :]
        control.append(off.amin(0).tolist())
        visit()

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, site in enumerate(placed):
            on_output(stack, site.block, functools.partial(note, index))
        bare = prompt.run(model, call)
    some = some[prompt.keep :] - prompt.keep
    wanted = outputs[..., some.to(outputs.device), :]
    off = _by_prompt(_last(bare, wanted), wanted)
    of_context = prompt.context_length - prompt.first if prompt.reference == "self" else 0
    return control, off[:, (some >= of_context).to(off.device)].min().item()


def _last(outputs: Tensor, like: Tensor) -> Tensor:
    """Return as many of the last outputs of each prompt as ``like`` has, in its shape."""
    return outputs.reshape(*like.shape[:-2], -1, like.shape[-1])[..., -like.shape[-2] :, :]


def _by_prompt(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the relative error for each prompt and position, ``[prompts, positions]``."""
    return relative_error(actual, expected).reshape(-1, expected.shape[-2])


def _transformers(model: nn.Module) -> dict[str, str]:
    from_there = type(model).__module__.startswith("transformers.")
    return {"transformers": version("transformers")} if from_there else {}
