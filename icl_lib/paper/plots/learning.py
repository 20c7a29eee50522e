"""Pictures of the last chapter of the argument: curves and bars with their controls, and what heads write."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from icl_lib.paper.figures import COLOURS, INK, UNDER, Figure, figure, heat_map, shade

PALE = {"color": COLOURS["grey"], "linestyle": "--"}


def curves(
    x: Any,
    series: Mapping[str, Any],
    title: str,
    alt: str,
    controls: Collection[str] = (),
    colours: Mapping[str, str] = MappingProxyType({}),
    mark: tuple[float | int, str] | None = None,
    width: float | int = 3.15,
    **axes: Any,
) -> Figure:
    """Draw a curve for each of ``series``; controls are grey.

    Args:
        colours: of the series that have a role, by name. The others go from purple to ochre.
        mark: a place on the x axis for a vertical line, and its name.
        axes: properties of the axes, such as ``xlabel`` and ``yscale``.
    """
    with figure(width=width, height=3.5) as (fig, ax):
        for number, (name, values) in enumerate(series.items()):
            colour = _colour(number, name, series, controls, colours)
            style = PALE if name in controls else {"color": colour, "marker": "os^D"[number % 4], "markersize": 5}
            ax.plot(x, values, label=name, **style)
        if mark is not None:
            ax.axvline(mark[0], color=INK, linewidth=0.8, linestyle=":", label=mark[1])
        ax.set(title=title, **axes)
        if "xticks" in axes:  # a logarithmic axis would label others between them
            ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        ax.legend(ncols=2, **UNDER)
    return Figure(fig, alt)


def answers(right: Any, said: Any, title: str, largest: int) -> Figure:
    """Draw what a model says against what is right, a dot for each question; the axes go to ``largest``."""
    right, said = np.asarray(right), np.asarray(said)
    ends = (0, largest)
    with figure(width=3.9, height=3.7) as (fig, ax):
        ax.plot(ends, ends, color=COLOURS["green"], linestyle="--")
        ax.plot(
            right, said, "o", color=COLOURS["vermillion"], alpha=0.45, markeredgewidth=0, label="the model’s answer"
        )
        ax.set(title=title, xlabel="right answer", ylabel="the model’s answer", aspect="equal", xlim=ends, ylim=ends)
    hit, off = np.mean(right == said), np.abs(right - said).mean()
    return Figure(fig, f"{title}: {hit:.0%} of {len(right)} answers are right; on average they are {off:.1f} off.")


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    what: str,
    controls: Collection[str],
    colours: Mapping[str, str | Sequence[str]] = MappingProxyType({}),
) -> Figure:
    """Draw shares as horizontal bars, one group for each name; controls are grey.

    Args:
        what: is shown, for the text alternative.
        colours: of the series that have a role, by name: one for all bars, or one for each. Of two series in one
            colour the first is pale.
    """
    with figure(width=4.1, height=0.9 + max(0.36, 0.17 * len(series)) * len(names)) as (fig, ax):
        place, thick, used = np.arange(len(names)), 0.8 / len(series), list(colours.values())
        for number, (name, values) in enumerate(series.items()):
            colour = _colour(number, name, series, controls, colours)
            pale = name in colours and colours[name] in used[1 + list(colours).index(name) :]
            at = place + thick * (number - (len(series) - 1) / 2)
            drawn = ax.barh(at, values, thick, color=colour, alpha=0.5 if pale else 1, label=name)
            ax.bar_label(drawn, [f"{value:.0%}" for value in values], padding=3, fontsize="small")
        ax.set(xlim=(0, 1.15), xticks=(), yticks=place)
        ax.set_yticklabels(names)
        ax.tick_params(length=0)
        ax.spines["bottom"].set_visible(False)
        ax.invert_yaxis()
        ax.grid(visible=False)
        if len(series) > 1:
            ax.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.02), fontsize="small", columnspacing=1)
    said = "; ".join(
        f"{name}: " + ", ".join(f"{value:.0%} {series_name}" for series_name, value in zip(series, row, strict=True))
        for name, *row in zip(names, *series.values(), strict=True)
    )
    return Figure(fig, f"{what}. {said}.")


def agreement(points: Mapping[str, tuple[Any, Any]], controls: Collection[str]) -> Figure:
    """Draw the measured against the predicted fall of a loss, ``(predicted, measured)`` by the name of the network."""
    points = {name: (np.asarray(predicted), np.asarray(measured)) for name, (predicted, measured) in points.items()}
    with figure(width=4.1, height=3.7) as (fig, ax):
        for name, (predicted, measured) in points.items():
            colour = COLOURS["grey" if name in controls else "blue"]
            ax.plot(predicted, measured, ".", color=colour, alpha=0.6, label=name)
        for draw in (ax.axhline, ax.axvline):
            draw(0, color=INK, linewidth=0.8, alpha=0.5)
        ax.set(
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
    return Figure(fig, f"The fall of the loss against its prediction to first order. {counts}.")


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


def _colour(
    number: int, name: str, series: Collection[str], controls: Collection[str], colours: Mapping[str, Any]
) -> Any:
    """The colour of a series, or one for each of its bars: that of its role, or its own."""
    if name in controls:
        return COLOURS["grey"]
    if name not in colours:
        return shade(number, len(series) - sum(each in controls for each in series))
    given = colours[name]
    return COLOURS[given] if isinstance(given, str) else [COLOURS[one] for one in given]
