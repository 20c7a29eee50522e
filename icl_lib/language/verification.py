"""Verify the identity for a language model and a prompt."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.language.absorb import first_token, prompted_by
from icl_lib.language.call import experts_one_by_one, full_call, run
from icl_lib.language.passes import Prompted, bar_over, with_context, without_context
from icl_lib.language.watch import on_output
from icl_lib.measures import relative_error, wide
from icl_lib.models.anatomy import anatomy_of
from icl_lib.report import TOLERANCE, Report

CONTROLS = 32
"""The number of positions of a prompt at which the model is also run without edits."""


def verify_tokens(
    model: nn.Module,
    ids: Tensor,
    context_length: int,
    reference: str,
    positions: str | None,
    tolerance: float | None,
    outer: str | None,
    joint: bool,
    progress: bool,
) -> Report:
    """Do what :func:`icl_lib.verification.verify` does, for token ids ``[*batch, n]``, in three runs of the model.

    The runs are: with the context; bare, at up to :data:`CONTROLS` positions; and edited.
    """
    anatomy, first = anatomy_of(model), first_token(context_length, reference, positions)
    outer = outer or anatomy.outer_choices[0]
    prompts, tokens = ids[..., 0].numel(), ids.shape[-1] - first
    error: list[list[float]] = []
    squared: list[float] = []

    with bar_over(len(model.get_submodule(anatomy.blocks)), 3, progress) as bar, experts_one_by_one(model, anatomy):
        readings, logits = with_context(model, full_call(ids), first, visit=bar.update)
        prompted = prompted_by(model, ids, context_length, reference, first, readings)
        control, output_control = _without_edits(model, prompted, logits, context_length - first, bar.update)

        def note(index: int, patched: Tensor) -> None:
            output = readings[index].output
            error.append(relative_error(patched, output).reshape(prompts, tokens).amax(0).tolist())
            squared.append((patched - output).to(wide(patched)).square().mean().item())
            bar.update()

        _, edited_logits = without_context(model, prompted, outer, joint, edits=False, require=False, visit=note)
    return Report(
        model=type(model).__name__,
        reference=reference,
        context_length=context_length,
        first=first,
        prompts=prompts,
        dtype=str(logits.dtype).removeprefix("torch."),
        device=str(logits.device),
        versions={"torch": torch.__version__} | _transformers(model),
        error=error,
        control=control,
        mean_squared_difference=squared,
        output_error=relative_error(edited_logits, logits).max().item(),
        output_control=output_control,
        tolerance=_tolerance(logits.dtype, anatomy.scale is not None and joint and prompted.shape.numel() > 1)
        if tolerance is None
        else float(tolerance),
    )


def _without_edits(
    model: nn.Module, prompted: Prompted, logits: Tensor, context: int, bar: Callable[[], Any]
) -> tuple[list[list[float]], float]:
    """Return the errors of the model on the bare query: after each block at some positions, and of its logits.

    For the logits, the first ``context`` positions are left out: they belong to the context.
    """
    prompts, tokens, call = prompted.shape[:-1].numel(), prompted.shape[-1], prompted.bare
    some = torch.arange(tokens)
    if call["input_ids"].shape[1] == 1 and tokens > CONTROLS:  # each position is a row of its own
        some = torch.linspace(0, tokens - 1, CONTROLS).round().long()
        rows = (torch.arange(prompts)[:, None] * tokens + some).flatten()
        call = {name: part[rows.to(part.device)] for name, part in call.items()}
    control: list[list[float]] = []

    def chosen(of_all: Tensor) -> Tensor:
        return of_all.reshape(prompts, tokens, -1)[:, some.to(of_all.device)].flatten(0, 1)

    def note(index: int, out: Tensor) -> None:
        output = chosen(prompted.readings[index].output)
        control.append(relative_error(out.reshape(output.shape), output).reshape(prompts, -1).amin(0).tolist())
        bar()

    with contextlib.ExitStack() as stack, torch.no_grad():
        for index, block in enumerate(model.get_submodule(anatomy_of(model).blocks)):
            on_output(stack, block, functools.partial(note, index))
        bare_logits = run(model, call)
    wanted = chosen(logits)
    off = relative_error(bare_logits.reshape(wanted.shape), wanted).reshape(prompts, -1)
    return control, off[:, (some >= context).to(off.device)].min().item()


def _tolerance(dtype: torch.dtype, rounded: bool) -> float:
    """Return the tolerance; a scale that several positions share cannot correct a norm that computes in float32."""
    return max(TOLERANCE[dtype], TOLERANCE[torch.float32]) if rounded else TOLERANCE[dtype]


def _transformers(model: nn.Module) -> dict[str, str]:
    from_there = type(model).__module__.startswith("transformers.")
    return {"transformers": version("transformers")} if from_there else {}
