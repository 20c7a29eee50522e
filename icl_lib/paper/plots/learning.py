"""Pictures of the last chapter of the argument: curves and bars with their controls, and what heads write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.figures import COLOURS, INK, UNDER, Figure, colour_of, figure, heat_map

PALE = {"color": COLOURS["grey"], "linestyle": "--"}


def curves(
    x: Any,
    series: Mapping[str, Any],
    title: str,
    alt: str,
    controls: Collection[str] = (),
    mark: tuple[float | int, str] | None = None,
    width: float | int = 3.3,
    **axes: Any,
) -> Figure:
    """Draw a curve for each of ``series``; controls are grey.

    Args:
        mark: a place on the x axis for a vertical line, and its name.
        axes: properties of the axes, such as ``xlabel`` and ``yscale``.
    """
    with figure(width=width, height=3.5) as (fig, ax):
        for number, (name, values) in enumerate(series.items()):
            style = PALE if name in controls else {"color": colour_of(number), "marker": "o", "markersize": 4}
            ax.plot(x, values, label=name, **style)
        if mark is not None:
            ax.axvline(mark[0], color=INK, linewidth=0.8, linestyle=":", label=mark[1])
        ax.set(title=title, **axes)
        if "xticks" in axes:  # a logarithmic axis would label others between them
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(ncols=2, **UNDER)
    return Figure(fig, alt)


def answers(right: Any, said: Any, title: str) -> Figure:
    """Draw what a model says against what is right, a dot for each question."""
    right, said = np.asarray(right), np.asarray(said)
    ends = (0, max(right.max(), said.max()) + 1)
    with figure(width=3.9, height=3.7) as (fig, ax):
        ax.plot(ends, ends, color=COLOURS["grey"], linestyle="--", linewidth=1)
        ax.plot(right, said, "o", color=COLOURS["blue"], alpha=0.45, markeredgewidth=0)
        ax.set(title=title, xlabel="right answer", ylabel="the model’s answer", aspect="equal", xlim=ends, ylim=ends)
    hit, off = np.mean(right == said), np.abs(right - said).mean()
    return Figure(fig, f"{title}: {hit:.0%} of {len(right)} answers are right; on average they are {off:.1f} off.")


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], title: str, controls: Collection[str]) -> Figure:
    """Draw shares as horizontal bars, one group for each name; controls are grey."""
    with figure(width=4.8, height=0.9 + 0.36 * len(names)) as (fig, ax):
        place, thick = np.arange(len(names)), 0.8 / len(series)
        for number, (name, values) in enumerate(series.items()):
            colour = COLOURS["grey"] if name in controls else colour_of(number)
            drawn = ax.barh(place + thick * (number - (len(series) - 1) / 2), values, thick, color=colour, label=name)
            ax.bar_label(drawn, [f"{value:.0%}" for value in values], padding=3, fontsize="small")
        ax.set(title=title, xlim=(0, 1.12), xticks=(), yticks=place)
        ax.set_yticklabels(names)
        ax.tick_params(length=0)
        ax.spines["bottom"].set_visible(False)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.02), fontsize="small")
    said = "; ".join(
        f"{name}: " + ", ".join(f"{value:.0%} {series_name}" for series_name, value in zip(series, row, strict=True))
        for name, *row in zip(names, *series.values(), strict=True)
    )
    return Figure(fig, f"{title}. {said}.")


def agreement(points: Mapping[str, tuple[Any, Any]], controls: Collection[str], title: str) -> Figure:
    """Draw the measured against the predicted fall of a loss, ``(predicted, measured)`` by the name of the network."""
    points = {name: (np.asarray(predicted), np.asarray(measured)) for name, (predicted, measured) in points.items()}
    with figure(width=4.4, height=3.7) as (fig, ax):
        for number, (name, (predicted, measured)) in enumerate(points.items()):
            colour = COLOURS["grey"] if name in controls else colour_of(number)
            ax.plot(predicted, measured, ".", color=colour, alpha=0.6, label=name)
        for draw in (ax.axhline, ax.axvline):
            draw(0, color=INK, linewidth=0.8, alpha=0.5)
        ax.set(
            title=title,
            xlabel="fall to first order, $-\\langle\\nabla L, \\Delta W\\rangle$",
            ylabel="fall of the loss",
        )
        for axis in ("x", "y"):
            getattr(ax, f"set_{axis}scale")("symlog", linthresh=0.01)
            getattr(ax, f"set_{axis}ticks")([-1, -0.01, 0.01, 1])
        ax.legend(ncols=2, **UNDER)
    counts = "; ".join(
        f"{name}: the signs agree for {np.mean(np.sign(p) == np.sign(m)):.0%} of {len(p)} prompts"
        for name, (p, m) in points.items()
    )
    return Figure(fig, f"{title}: the fall of the loss against its prediction to first order. {counts}.")


def head_columns(sizes: Any, columns: Sequence[str], title: str, largest: float) -> Figure:
    """Draw how much each head writes of each coordinate of a token, ``[heads, columns]``, as a heat map."""
    sizes = np.asarray(sizes, dtype=float)
    with figure(width=3.1, height=3.4) as (fig, ax):
        heat_map(ax, sizes, largest, numbers=True)
        ax.set(title=title, ylabel="head", aspect="auto")
        ax.set_xticks(range(len(columns)), columns)
        ax.set_yticks(range(len(sizes)), [str(head + 1) for head in range(len(sizes))])
        ax.tick_params(length=0)
    top = ", ".join(f"{name} up to {size:.2f}" for name, size in zip(columns, sizes.max(0), strict=True))
    return Figure(fig, f"{title}: heat map of what {len(sizes)} heads write: {top}.")
