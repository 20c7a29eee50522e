"""Pictures of compiled prompts beside other ways to replace a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.figures import COLOURS, INK, UNDER, Axes, Figure, colour_of, figure

Run = Mapping[str, Any]


def divergence_by(
    x: Sequence[float | int], runs: Sequence[Run], bare: Run, label: str, more: Mapping[str, Run]
) -> Figure:
    """Draw the divergence from the prompted model over a setting of the compiled prompts, with intervals.

    Args:
        x: the values of the setting.
        runs: of ``icl_lib.paper.compiling.summarise``, one for each.
        bare: the run of the bare question; control.
        label: of the setting.
        more: other runs by name, drawn as lines: they do not depend on the setting.
    """
    with figure(width=4.6, height=3.6) as (fig, ax):
        ax.axhline(bare["kl"][0], color=COLOURS["grey"], linestyle="--", label="bare question")
        for number, (name, run) in enumerate(more.items(), start=1):
            ax.axhline(run["kl"][0], color=colour_of(number), linestyle=":", label=name)
        _with_intervals(ax, x, runs, "kl", color=COLOURS["blue"], marker="o", label="compiled")
        ax.set(xlabel=label, ylabel="divergence, nats", xscale="log", yscale="log")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.legend(ncols=2, **UNDER)
    points = "; ".join(f"{value:g}: {run['kl'][0]:.2g}" for value, run in zip(x, runs, strict=True))
    others = "".join(f", {name} {run['kl'][0]:.2g}" for name, run in more.items())
    return Figure(
        fig,
        f"Divergence from the prompted model on held-out questions over {label}, with 95 % intervals. {points}. "
        f"Bare question {bare['kl'][0]:.2g}{others}.",
    )


def divergence_over_time(paths: Mapping[str, Mapping[str, tuple[float, float]]], bare: float) -> Figure:
    """Draw the divergence from the prompted model over the seconds that it takes to get there.

    ``paths`` has for each method the seconds and the divergence of each of its runs, by the label of the run; ``bare``
    is the divergence of the bare question, the control.
    """
    with figure(width=5.0, height=3.6) as (fig, ax):
        ax.axhline(bare, color=COLOURS["grey"], linestyle="--", label="bare question")
        for number, (name, runs) in enumerate(paths.items()):
            colour = COLOURS["blue"] if number == 0 else colour_of(number)
            ax.plot(*zip(*runs.values(), strict=True), color=colour, marker="o", label=name)
            for label, place in runs.items():
                ax.annotate(label, place, (5, 4), textcoords="offset points", fontsize="small")
        ax.set(xlabel="seconds of one core", ylabel="divergence, nats", xscale="log", yscale="log")
        ax.set_xticks([1, 10, 100], ["1", "10", "100"])
        ax.set_yticks([0.5, 1, 2, 5], ["0.5", "1", "2", "5"])
        ax.margins(x=0.12)
        ax.minorticks_off()
        ax.legend(ncols=3, **UNDER)
    said = "; ".join(
        f"{name}: " + ", ".join(f"{label} {kl:.2g} after {seconds:.2g} s" for label, (seconds, kl) in runs.items())
        for name, runs in paths.items()
    )
    return Figure(
        fig, f"Divergence from the prompted model over the time to get there. {said}. Bare question {bare:.2g}."
    )


def linear_shares(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw what ``icl_lib.paper.compiling.linear_share`` returns over the blocks."""
    styles = {"fitted": ("blue", "--"), "held out": ("blue", "-"), "shuffled": ("grey", ":")}
    labels = {"fitted": "questions of the fit", "held out": "new questions", "shuffled": "changes of other tokens"}
    with figure(width=5.4, height=3.4) as (fig, ax):
        for name, (colour, line) in styles.items():
            ax.plot(shares[name], color=COLOURS[colour], linestyle=line, label=labels[name])
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set(xlabel="block", ylabel="share of the change, $R^2$", ylim=(min(-0.1, *shares["shuffled"]), 1.02))
        ax.legend(ncols=3, **UNDER)
    means = ", ".join(f"{labels[name]} {np.mean(shares[name]):.2f}" for name in styles)
    return Figure(fig, f"Share of the prompt's change that one matrix makes, over the blocks. Means: {means}.")


def accuracy_by_task(runs: Mapping[str, Run]) -> Figure:
    """Draw the share of right answers of each task and method, with intervals; the prompted model as a bar.

    ``runs`` are those of ``icl_lib.paper.compiling.summarise``, by the name of the method.
    """
    tasks = list(next(iter(runs.values()))["by_task"])
    place = np.arange(len(tasks))
    with figure(width=6.8, height=3.8) as (fig, ax):
        prompted = [next(iter(runs.values()))["by_task"][task]["prompted"] for task in tasks]
        ax.bar(place, prompted, width=0.86, color=INK, alpha=0.12, label="prompt")
        for number, (name, run) in enumerate(runs.items()):
            found = [run["by_task"][task] for task in tasks]
            mean, low, high = (np.array([one[key] for one in found]) for key in ("accuracy", "low", "high"))
            at = place + 0.8 * ((number + 0.5) / len(runs) - 0.5)
            ax.errorbar(
                at,
                mean,
                _reach(mean, low, high),
                fmt="os^Dv"[number % 5],
                color=colour_of(number),
                markersize=5,
                label=name,
            )
        ax.set(ylabel="right answers", ylim=(-0.02, 1.02))
        ax.set_xticks(place, tasks)
        ax.grid(visible=False, axis="x")
        ax.legend(ncols=3, **UNDER)
    said = "; ".join(
        f"{task}: prompt {prompted[number]:.2f}, "
        + ", ".join(f"{name} {run['by_task'][task]['accuracy']:.2f}" for name, run in runs.items())
        for number, task in enumerate(tasks)
    )
    return Figure(fig, f"Share of right answers to held-out questions, by task and method. {said}.")


def _with_intervals(ax: Axes, x: Sequence[float | int], runs: Sequence[Run], name: str, **style: Any) -> None:
    mean, low, high = np.transpose([run[name] for run in runs])
    ax.errorbar(x, mean, _reach(mean, low, high), **style)


def _reach(mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The lengths of the error bars; rounding may have put a mean a little outside its interval."""
    return np.maximum([mean - low, high - mean], 0)
