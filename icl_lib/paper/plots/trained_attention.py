"""Pictures of what training finds: preconditioners, rates, drops and plateaus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.figures import COLOURS, INK, UNDER, Figure, Row, figure, heat_map, shade

PREDICTED = {"color": INK, "linewidth": 7, "alpha": 0.22}
"""A wide pale line for what was computed beforehand, on which the curve found by training can lie."""


def rates_found(steps: Sequence[int], rates: Any, best: Sequence[float]) -> Figure:
    """The rate of each layer during training ``[records, layers]``, with the best rates as wide lines."""
    with figure(width=3.15, height=3.5) as (fig, ax):
        for value in best:
            ax.axhline(value, **PREDICTED)
        for layer, curve in enumerate(np.asarray(rates).T):
            ax.plot(steps, curve, color=shade(layer, len(best)), label=f"layer {layer + 1}")
        ax.set(title="the rate of each layer", xlabel="training step", ylabel="$a_l$", ylim=(0, 1.2 * max(best)))
        ax.legend(ncols=3, **UNDER)
    ends = ", ".join(f"{value:.3f}" for value in np.asarray(rates)[-1])
    return Figure(
        fig,
        f"The rate of each layer over {steps[-1]} training steps. They start near 0 and end at {ends}. The computed "
        f"rates are {', '.join(f'{value:.3f}' for value in best)}.",
    )


def distances(steps: Sequence[int], to_inverse: Any, to_identity: Any) -> Figure:
    r"""How far each layer is from a multiple of $\Sigma^{-1}$ during training, and, in grey, of the identity."""
    with figure(width=3.15, height=3.5) as (fig, ax):
        for layer, curve in enumerate(np.asarray(to_identity).T):
            ax.plot(steps, curve, color=COLOURS["grey"], linestyle="--", label="to $I$" if layer == 0 else None)
        for layer, curve in enumerate(np.asarray(to_inverse).T):
            label = rf"to $\Sigma^{{-1}}$, layer {layer + 1}"
            ax.plot(steps, curve, color=shade(layer, len(to_inverse[0])), label=label)
        ax.set(title="distance to a multiple", xlabel="training step", ylabel="relative distance", yscale="log")
        ax.legend(ncols=2, **UNDER)
    first, last = np.asarray(to_inverse)[0].max(), np.asarray(to_inverse)[-1].max()
    plain = np.asarray(to_identity)[-1].min()
    return Figure(
        fig,
        f"The relative distance of each layer’s matrix to a multiple of the inverse covariance falls from {first:.2f} "
        f"to at most {last:.2g}. To a multiple of the identity it stays above {plain:.2f}.",
    )


def matrices(named: Mapping[str, Any]) -> Row:
    """Square matrices side by side, in one scale of colours."""
    limit = max(float(np.abs(np.asarray(matrix)).max()) for matrix in named.values())
    pictures = []
    for name, matrix in named.items():
        matrix = np.round(np.asarray(matrix), 2) + 0.0  # no −0.00
        with figure(width=2.1, height=2.1) as (fig, ax):
            heat_map(ax, matrix, limit, numbers=True)
            ax.set(title=name, xticks=[], yticks=[])
        rows = "; ".join(", ".join(f"{value:.2f}" for value in row) for row in matrix)
        pictures.append(Figure(fig, f"{name}, a matrix with the rows {rows}."))
    return Row(*pictures)


def shrinkage(variances: Any, optimum: Any, examples: int, marked: Sequence[float]) -> Figure:
    r"""What the best layer multiplies a direction of variance $\lambda$ by, and $1/\lambda$."""
    variances, optimum = np.asarray(variances), np.asarray(optimum)
    with figure(width=4.1, height=3.3) as (fig, ax):
        ax.plot(variances, 1 / variances, color=COLOURS["grey"], linestyle="--", label=r"$1/\lambda$")
        ax.plot(variances, optimum, color=COLOURS["purple"], label="the best layer")
        ax.plot(marked, np.interp(marked, variances, optimum), "o", color=COLOURS["ochre"], label="these inputs")
        ax.set(
            title=f"{examples} examples", xlabel=r"variance of a direction, $\lambda$", ylabel="its rate",
            xscale="log", yscale="log", ylim=(0.05, 30),
        )  # fmt: skip
        ax.legend(ncols=3, **UNDER)
    at = "; ".join(f"{value:.2g}: {np.interp(value, variances, optimum):.2g}" for value in marked)
    return Figure(fig, f"The rate of a direction against its variance, for {examples} examples. At the variances {at}.")


def drop(times: Any, found: Mapping[str, Any], predicted: Any, controls: Mapping[str, Any]) -> Figure:
    """A strength over time: the prediction as a wide line, training on it, and controls in grey."""
    with figure(width=4.1, height=3.6) as (fig, ax):
        ax.plot(times, predicted, **PREDICTED, label="closed form")
        for number, (name, curve) in enumerate(controls.items()):
            ax.plot(times, curve, color=COLOURS["grey"], linestyle=("--", ":")[number % 2], label=name)
        for number, (name, curve) in enumerate(found.items()):
            ax.plot(times, curve, color=shade(number, len(found)), linestyle=_dashes(number), label=name)
        ax.set(xlabel="time", ylabel=r"strength, $\sigma$")
        ax.legend(ncols=2, **UNDER)
    ends = "; ".join(f"{name} {np.asarray(curve)[-1]:.3f}" for name, curve in {**found, **controls}.items())
    return Figure(
        fig,
        "The strength of the prediction over training time. It stays near 0, and then rises to "
        f"{np.asarray(predicted)[-1]:.3f} within a short time, as the closed form does. At the end: {ends}.",
    )


def staircase(times: Any, losses: Mapping[str, Any], levels: Sequence[float], controls: Mapping[str, Any]) -> Figure:
    """Losses over a logarithmic time, with the predicted plateaus as wide lines, and controls in grey.

    A curve may be shorter than the times.
    """
    with figure(width=4.1, height=3.7) as (fig, ax):
        for number, level in enumerate(levels):
            ax.axhline(level, **{**PREDICTED, "linewidth": 5}, label=None if number else "predicted plateaus")
        for number, (name, curve) in enumerate(controls.items()):
            ax.plot(times[: len(curve)], curve, color=COLOURS["grey"], linestyle=("--", ":")[number % 2], label=name)
        for number, (name, curve) in enumerate(losses.items()):
            style = {"color": shade(number, len(losses)), "linestyle": _dashes(number)}
            ax.plot(times[: len(curve)], curve, label=name, **style)
        ax.set(xlabel="time", ylabel="expected squared error", ylim=(0, 1.1 * max(levels)), xscale="log")
        ax.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        ax.legend(ncols=2, **UNDER)
    ends = "; ".join(f"{name} {np.asarray(curve)[-1]:.3f}" for name, curve in {**losses, **controls}.items())
    return Figure(
        fig,
        "The expected squared error over training time. It falls in steps, and pauses at the predicted plateaus "
        f"{', '.join(f'{level:.3f}' for level in levels)}. At the end: {ends}.",
    )


def _dashes(number: int) -> Any:
    """The second of two curves that lie on each other has dashes."""
    return "-" if number % 2 == 0 else (0, (4, 3))
