"""Figures about every position and every block: those of Innocenti and Achour, and their controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.measures import scientific
from icl_lib.paper.figures import COLOURS, UNDER, WIDE, Figure, figure, heat_map, shade, signed


def losses(measured: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the test loss over training of experiment and theory, with the controls without edits.

    ``measured`` is what :func:`icl_lib.paper.experiments.run_every_block` returns.
    """
    experiment, theory, unedited, bare = (measured[name] for name in ("experiment", "theory", "unedited", "bare"))
    step = range(len(experiment))
    with figure(width=4.0, height=3.9) as (fig, ax):
        ax.plot(step, bare, color=COLOURS["grey"], linestyle="--", label="network, no edit")
        ax.plot(step, unedited, color=COLOURS["grey"], linestyle=":", label="last block, no edit")
        ax.plot(step, experiment, **WIDE, label="experiment: prompt")
        ax.plot(step, theory, color=COLOURS["blue"], label="theory: edited")
        ax.set(xlabel="training step", ylabel="test loss", yscale="log")
        ax.legend(ncols=2, **UNDER)
    return Figure(
        fig,
        f"Test loss over {len(step)} training steps. The experiment's curve goes from {experiment[0]:.2g} to "
        f"{experiment[-1]:.2g}, and the theory's lies on it. Without edits the last block ends at {unedited[-1]:.2g}, "
        f"and the whole network on the bare query at {bare[-1]:.2g}.",
    )


def differences(
    step: Sequence[int], difference: Sequence[Sequence[float]], control: Sequence[Sequence[float]]
) -> Figure:
    """Draw the mean squared difference of each edited block from the block with context, over training.

    The control is the block without its edit.

    ``difference`` and ``control`` are ``[steps][blocks]``.
    """
    values, without = np.array(difference), np.array(control)
    blocks = values.shape[1]
    with figure(width=4.0, height=3.7) as (fig, ax):
        ax.plot(step, without, color=COLOURS["grey"], linestyle="--", label=["no edit", *[None] * (blocks - 1)])
        for block in range(blocks):
            ax.plot(step, values[:, block], **_styled(block, blocks))
        ax.set(xlabel="training step", ylabel="mean squared difference", yscale="log")
        ax.legend(ncols=3, **UNDER)
    low, high, least, most = (scientific(end.item()) for each in (values, without) for end in (each.min(), each.max()))
    return Figure(
        fig,
        f"Mean squared difference over training, by block: between {low} and {high} with the edits, and between "
        f"{least} and {most} without.",
    )


def norms(step: Sequence[int], frobenius: Sequence[Sequence[float]]) -> Figure:
    """Draw the norm of the last position's update over training; ``frobenius`` is ``[steps][blocks]``."""
    with figure(width=4.0, height=3.2) as (fig, ax):
        for block, values in enumerate(np.transpose(frobenius)):
            ax.plot(step, values, **_styled(block, len(frobenius[0])))
        ax.set(xlabel="training step", ylabel="‖ΔW‖ at the query", ylim=(0, None))
        ax.legend(ncols=3, **UNDER)
    ends = ", ".join(f"{value:.2g}" for value in frobenius[-1])
    return Figure(fig, f"Norm of the query's update over training, by block. At the end: {ends}.")


def _styled(block: int, blocks: int) -> dict[str, Any]:
    """The style of a block's curve over training: a colour and a marker, since neighbours have like colours."""
    marks = {"marker": "osD^v"[block % 5], "markersize": 5, "markevery": (4 * block, 20)}
    return {"color": shade(block, blocks), "label": f"block {block + 1}", **marks}


def alignments(table: Any, title: str, of: str) -> Figure:
    """Draw a table of cosines as a heat map from −1 to 1, a small one with its numbers; ``of`` labels the axes."""
    table = np.asarray(table)
    small = len(table) <= 8
    with figure(width=3.15, height=3.1) as (fig, ax):
        picture = heat_map(ax, table, 1, numbers=small)
        ax.set(title=title, xlabel=of, ylabel=of)
        ticks = range(len(table)) if small else range(9, len(table), 10)
        ax.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        ax.set_yticks(ticks, [str(tick + 1) for tick in ticks])
        if not small:
            fig.colorbar(picture, ax=ax, shrink=0.55)  # no higher than the picture: the title may reach above it
    off = table[~np.eye(len(table), dtype=bool)]
    low, high = (signed(end, ".2f") for end in (off.min(), off.max()))
    return Figure(
        fig,
        f"{title}: heat map of {len(table)} by {len(table)} cosines. Off the diagonal they lie between {low} "
        f"and {high}.",
    )


def renumberings(values: Sequence[float], measured: float) -> Figure:
    """Draw the alignment of two blocks under many orders of the hidden units, and in the model as trained."""
    with figure(width=4.0, height=2.9) as (fig, ax):
        ax.hist(values, bins=30, color=COLOURS["grey"], alpha=0.7)
        ax.axvline(measured, color=COLOURS["purple"], linewidth=3)
        ax.annotate("as trained", (measured, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
        ax.set(xlabel="alignment of the two blocks’ updates", ylabel="number of orders")
    below = np.mean(np.asarray(values) < measured)
    low, high, found = (signed(value, ".2f") for value in (min(values), max(values), measured))
    return Figure(
        fig,
        f"Histogram of the alignment over {len(values)} orders of the hidden units, from {low} to {high}. As trained "
        f"it is {found}, larger than in {below:.0%} of them.",
    )


def errors_by_block(errors: Mapping[str, Sequence[float]], control: Sequence[float], title: str) -> Figure:
    """Draw the largest error of each block in several precisions, with the control without edits."""
    with figure(width=4.0, height=3.5) as (fig, ax):
        blocks = range(1, len(control) + 1)
        ax.plot(blocks, control, "--o", color=COLOURS["grey"], markersize=4, label="no edit")
        for number, (name, values) in enumerate(errors.items()):
            ax.plot(blocks, values, "-o", color=shade(number, len(errors)), markersize=4, label=name)
        ax.set(title=title, xlabel="block", ylabel="relative error", yscale="log", ylim=(1e-17, 10))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.legend(ncols=3, **UNDER)
    said = "; ".join(f"{name} at most {scientific(max(values))}" for name, values in errors.items())
    least = scientific(min(control))
    return Figure(fig, f"{title}. Relative error by block: {said}; without the edits at least {least}.")


def errors_by_depth(
    depths: Sequence[int],
    whole: Mapping[str, Sequence[float]],
    block: Mapping[str, Sequence[float]],
    control: Sequence[float],
    title: str,
) -> Figure:
    """Draw the error of the whole network and the largest error of a single block over the number of blocks.

    ``whole`` and ``block`` have one list for each precision, with an entry for each depth. ``control`` is the error of
    the whole network without edits.
    """
    with figure(width=3.15, height=3.9) as (fig, ax):
        ax.plot(depths, control, "--", color=COLOURS["grey"], label="network, no edit")
        for number, name in enumerate(whole):
            colour = shade(number, len(whole))
            ax.plot(depths, whole[name], "-o", color=colour, markersize=4, label=f"network, {name}")
            ax.plot(depths, block[name], ":s", color=colour, markersize=3, label=f"one block, {name}")
        ax.set(title=title, xlabel="number of blocks", ylabel="relative error", xscale="log", yscale="log")
        ax.set_ylim(1e-17, 10)
        ax.set_xticks(depths, [str(depth) for depth in depths])
        ax.minorticks_off()
        ax.legend(**UNDER, labelspacing=0.2)
    said = "; ".join(
        f"{name}: whole network from {scientific(whole[name][0])} to {scientific(whole[name][-1])}, one block at most "
        f"{scientific(max(block[name]))}"
        for name in whole
    )
    return Figure(
        fig,
        f"{title}. Relative error for {depths[0]} to {depths[-1]} blocks. {said}. Without edits at least "
        f"{min(control):.1g}.",
    )


def varied(runs: Sequence[Mapping[str, Any]], name: str, label: str) -> Figure:
    """Draw the test loss over training for several values of one setting: medians and quartiles over seeds.

    ``runs`` come from :func:`icl_lib.paper.experiments.summarise`.
    """
    with figure(width=3.15, height=3.1) as (fig, ax):
        for number, run in enumerate(runs):
            colour = shade(number, len(runs))
            steps = run["experiment"]["steps"]
            low, median, high = (np.array(run["experiment"][part], dtype=float) for part in ("low", "median", "high"))
            ax.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
            ax.plot(steps, median, color=colour, label=f"{run['settings'][name]}")
            theory = np.array(run["theory"]["median"], dtype=float)[::10]
            ax.plot(steps[::10], theory, "o", color=colour, markersize=4)
        ax.set(title=label, xlabel="training step", ylabel="test loss", yscale="log")
        ax.legend(ncols=3, **UNDER)
    last = [run["experiment"]["median"][-1] for run in runs]
    ends = ", ".join(
        f"{run['settings'][name]}: {'diverged' if value is None else format(value, '.2g')}"
        for run, value in zip(runs, last, strict=True)
    )
    return Figure(
        fig, f"{label}: test loss over training, median over seeds. At the end {ends}. The theory lies on it."
    )
