"""Pictures of the identity in one block: training curves, a context removed in part, the solution set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from icl_lib.measures import scientific
from icl_lib.paper.experiments.one_block import TrainingCurves
from icl_lib.paper.figures import COLOURS, UNDER, WIDE, Axes, Figure, Row, figure, heat_map, signed


def training_curves(curves: TrainingCurves) -> Figure:
    """Validation loss over training: the prompted model, the edited model on the bare query, and two controls."""
    with figure(width=4.6, height=3.9) as (fig, ax):
        ax.plot(curves.step, curves.swapped, color=COLOURS["grey"], linestyle=":", label="another prompt's edit")
        ax.plot(curves.step, curves.unedited, color=COLOURS["grey"], linestyle="--", label="bare query, no edit")
        ax.plot(curves.step, curves.prompted, **WIDE, label="prompt, $T_W(C, x)$")
        ax.plot(curves.step, curves.edited, color=COLOURS["blue"], label="edited weights, $T_{W+ΔW}(x)$")
        ax.set(yscale="log", xlabel="training step", ylabel="validation loss")
        ax.legend(ncols=2, **UNDER)
    return Figure(
        fig,
        f"Validation loss over {curves.step[-1]} training steps. The curve of the prompted model falls from "
        f"{curves.prompted[0]:.2g} to {curves.prompted[-1]:.2g}; the curve of the edited model on the bare query "
        f"lies on it. Without an edit the loss ends at {curves.unedited[-1]:.2g}, with another prompt's edit "
        f"at {curves.swapped[-1]:.2g}.",
    )


def removal(
    kept: Sequence[int],
    norms: Sequence[float],
    prompted: float,
    edited: Sequence[float],
    bare: Sequence[float],
    right: float,
    at: int,
    limits: tuple[float, tuple[float, float]] | None = None,
) -> Row:
    """The norm of the edit when more or less of a context is removed, and the answers with and without the edit.

    Args:
        kept: how many context tokens are kept, in each case.
        norms: the edit's Frobenius norm.
        prompted: the answer with the full context.
        edited: the edited model's answer with the kept part.
        bare: the unedited model's answer with the kept part. Control.
        right: the right answer. Where it is outside the limits, the legend says so.
        at: the case to mark, an index into ``kept``.
        limits: the largest norm and the range of answers on the axes, so that several pictures share them.
    """
    most, answers_range = limits or (None, None)
    here = f"With {kept[at]} of {kept[-1]} examples kept"
    with figure(width=3.15, height=2.9) as (size, ax):
        _walked(ax, kept, norms, at)
        ax.set(title="norm of the edit, ‖ΔW‖", xlabel="examples kept", ylim=(0, most))
    with figure(width=3.15, height=2.9) as (answers, ax):
        visible = answers_range is None or answers_range[0] <= right <= answers_range[1]
        name = "right answer" if visible else f"right answer, {signed(right, '.2f')}: outside"
        ax.axhline(right, color=COLOURS["green"], linestyle=":", label=name)
        ax.axhline(prompted, **WIDE, label="full prompt")
        _walked(ax, kept, bare, at, color=COLOURS["grey"], linestyle="--", label="kept part, no edit")
        _walked(ax, kept, edited, at, label="kept part + edit")
        ax.set(title="the model's answer", xlabel="examples kept", ylim=answers_range)
        ax.legend(fontsize="small")
    return Row(
        Figure(size, f"{here}, the edit has norm {norms[at]:.2f}."),
        Figure(
            answers,
            f"{here}: the full prompt's answer is {prompted:.3f}; the kept part with the edit gives {edited[at]:.3f}, "
            f"without it {bare[at]:.3f}. The right answer is {right:.3f}.",
        ),
    )


def solution_family(
    steps: Sequence[float], norms: Sequence[float], edits: Sequence[np.ndarray], effect: float, rank: int, at: int
) -> Row:
    """The norm of the edits along a line in the solution set, and one of these edits.

    Args:
        steps: positions on the line; 0 is the least-norm edit.
        norms: Frobenius norm of each edit.
        edits: ``[out, in]`` each.
        effect: the relative error of the edit at ``steps[at]`` in the pre-activation.
        rank: the rank of that edit.
        at: the edit to show, an index into ``steps``.
    """
    with figure(width=3.6, height=2.8) as (size, ax):
        _walked(ax, steps, norms, at)
        ax.set(title="norm of the edit", xlabel="position $t$ on the line", ylim=(0, None))
    with figure(width=2.9, height=2.8) as (heat, ax):
        heat_map(ax, edits[at], np.abs(edits).max(), numbers=True)
        ax.set(
            title=f"the edit at $t$ = {signed(steps[at])}: rank {rank}", xlabel=f"effect off by {scientific(effect)}"
        )
        ax.set(xticks=[], yticks=[])
    return Row(
        Figure(
            size,
            "The norm of the edits against their position t on the line, smallest at t = 0. "
            f"Here t is {steps[at]:g} and the norm {norms[at]:.2f}.",
        ),
        Figure(
            heat,
            f"The edit at t = {steps[at]:g} as a heat map. Its rank is {rank}, and it reproduces the pre-activation "
            f"to a relative error of {scientific(effect)}.",
        ),
    )


def _walked(ax: Axes, x: Sequence[float | int], y: Sequence[float], at: int, **style: Any) -> None:
    """Draw a curve with a dot at one of its points."""
    style = {"color": COLOURS["blue"], **style}
    ax.plot(x, y, **style)
    ax.plot(x[at], y[at], "o", color=style["color"], markersize=9)
