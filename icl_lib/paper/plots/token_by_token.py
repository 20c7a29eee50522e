"""Pictures of a prompt read token by token: the steps of the weights, their losses and their directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.experiments.token_by_token import BesideSGD, Cosines, Estimate, TokenByToken
from icl_lib.paper.figures import COLOURS, INK, UNDER, Axes, Figure, Row, figure, heat_map, shade


def increments(readings: Mapping[str, TokenByToken], control: str, title: str) -> Figure:
    """The length of each token's step on log–log axes, with the prediction of the running average.

    ``readings`` by the name of the network; ``control`` names the untrained one.
    """
    with figure(width=3.15, height=3.6) as (fig, ax):
        for number, (name, reading) in enumerate(readings.items()):
            style = _style(number, len(readings), name == control)
            token = np.arange(1, len(reading.norms.mean) + 1)
            if reading.predicted is not None:
                ax.plot(token, reading.predicted.mean, color=style["color"], linewidth=7, alpha=0.35)
            _banded(ax, token, reading.norms, label=f"{name}, slope {reading.exponent}", **style)
        if any(reading.predicted is not None for reading in readings.values()):
            ax.plot([], [], color=INK, linewidth=7, alpha=0.25, label="predicted (wide band)")
        means = np.concatenate([reading.norms.mean for reading in readings.values()])
        ax.set(title=title, xscale="log", yscale="log", xlabel="token", ylabel="length of its step")
        ax.set_ylim(min(0.1, means.min()) / 1.3, max(2, means.max()) * 1.3)  # a decade at least
        ax.legend(ncols=1, **UNDER)
    summary = "; ".join(
        f"{name} from {reading.norms.mean[0]:.2g} to {reading.norms.mean[-1]:.2g}, slope {reading.exponent}"
        for name, reading in readings.items()
    )
    return Figure(fig, f"{title}: norm of each token’s step against the token’s number, on log–log axes. {summary}.")


def learning(reading: TokenByToken, sgd: Mapping[float, BesideSGD], title: str, ceiling: float | None = None) -> Figure:
    """The error at the query after each example, for reading and for SGD (Figure 4 of Dherin et al.)."""
    with figure(width=3.15, height=3.7) as (fig, ax):
        step = np.arange(len(reading.loss.mean))
        for number, (rate, trained) in enumerate(sgd.items()):
            _banded(ax, step, trained.loss, color=shade(number, len(sgd)), linestyle="--", label=f"SGD, rate {rate:g}")
        _banded(ax, step, reading.loss, color=COLOURS["blue"], linewidth=2.4, label="reading, $W_i$")
        ax.set(title=title, xlabel="examples seen", ylabel="squared error at the query", yscale="log")
        if ceiling is not None:
            ax.set_ylim(ceiling / 1000, ceiling)
        ax.legend(ncols=2, **UNDER)
    ends = "; ".join(f"SGD at rate {rate:g}: {trained.loss.mean[-1]:.2g}" for rate, trained in sgd.items())
    return Figure(
        fig,
        f"{title}: squared error at the query against the number of examples. With the weights of reading it goes from "
        f"{reading.loss.mean[0]:.2g} to {reading.loss.mean[-1]:.2g}. After all examples, {ends}.",
    )


def step_cosines(cosines: Mapping[str, Cosines], controls: Sequence[str], title: str) -> Figure:
    """The cosine of each token's step with a descent direction; the controls are drawn in grey."""
    with figure(width=3.15, height=3.4) as (fig, ax):
        for number, (name, cosine) in enumerate(cosines.items()):
            token = np.arange(1, len(cosine.by_token.mean) + 1)
            style = _style(number, len(cosines), name in controls)
            if name in controls[1:]:
                style["linestyle"] = "-."
            _banded(ax, token, cosine.by_token, label=name, **style)
        ceiling = next(iter(cosines.values())).ceiling
        ax.axhline(ceiling, color=INK, linestyle=":", label=f"upper bound, {next(iter(cosines))}")
        ax.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
        ax.set(title=title, xlabel="token", ylabel="cosine", ylim=(-0.25, 1.05))
        ax.legend(ncols=2, **UNDER)
    means = "; ".join(f"{name} {cosine.mean}" for name, cosine in cosines.items())
    return Figure(fig, f"{title}: cosine at each token. Mean over tokens: {means}. The upper bound is {ceiling:.2f}.")


def token_losses(readings: Mapping[str, TokenByToken]) -> Row:
    """The normalised LMS loss of each token before and after its own step, one picture for each network.

    All contextual layers must be running averages; others have no such loss.
    """
    pictures = []
    for name, reading in readings.items():
        before, after = reading.lms_before, reading.lms_after
        token = np.arange(1, len(before.mean) + 1)
        with figure(width=3.15, height=3.2) as (fig, ax):
            _banded(ax, token, before, color=COLOURS["purple"], label="before")
            _banded(ax, token, after, color=COLOURS["ochre"], label="after")
            ax.set(title=name, xlabel="token", ylabel="the token’s own loss", xscale="log", ylim=(0, None))
            ax.legend(ncols=2, **UNDER)
        pictures.append(
            Figure(
                fig,
                f"{name}: the loss of each token before its step and after. First token: {before.mean[0]:.2g} and "
                f"{after.mean[0]:.2g}; last token: {before.mean[-1]:.3g} and {after.mean[-1]:.3g}.",
            )
        )
    return Row(*pictures)


def ranks(left: Mapping[str, Estimate], whole: Estimate, control: str, bound: int) -> Figure:
    """The rank of the edit against removed tokens: from the left, for each network, and for the path $W_i$."""
    with figure(width=4.1, height=3.5) as (fig, ax):
        eaten = np.arange(len(whole.mean))
        for number, (name, rank) in enumerate(left.items()):
            _banded(ax, eaten, rank, label=f"left, {name}", **_style(number, len(left), name == control))
        ax.plot(eaten, np.minimum(eaten, bound), color=INK, linestyle=":", label="upper bound")
        _banded(ax, eaten, whole, color=COLOURS["blue"], label="$W_i - W$")
        ax.set(xlabel="tokens removed", ylabel="rank of the edit", ylim=(0, bound + 1))
        ax.legend(ncols=2, **UNDER)
    ends = "; ".join(f"{name} {rank.mean[-1]:.1f}" for name, rank in left.items())
    return Figure(
        fig,
        f"Rank of the edit against removed tokens. From the left, after all: {ends}. On the path W_i: "
        f"{whole.mean[-1]:.0f}.",
    )


def scrubbed(
    token: int,
    update: np.ndarray,
    step: np.ndarray,
    rate: float,
    predictions: Sequence[float],
    right: float,
    limit: float,
    answers_range: tuple[float, float],
) -> Row:
    """The state after some tokens: the edit so far, the step of the last token, and the predictions up to here.

    Args:
        token: how many tokens have been read.
        update: $W_i - W$, ``[out, in]``.
        step: $W_i - W_{i-1}$, of the same shape.
        rate: $\\alpha_i$, or its mean over heads.
        predictions: the predictions after 0, 1, … tokens, all of them.
        right: the target.
        limit: the largest absolute value on the colour scale of the two matrices.
        answers_range: the ends of the axis of the predictions, so that several pictures share them.
    """
    with figure(width=3.15, height=3.1, columns=2) as (heat, axes):
        for ax, matrix, title in zip(axes, (update, step), ("$W_i - W$", f"step, α = {rate:.3f}"), strict=True):
            heat_map(ax, matrix, limit, aspect="auto")
            ax.set(title=title, xticks=[], yticks=[])
        axes[0].set(ylabel="hidden unit", xlabel="activation")
    with figure(width=3.15, height=3.1) as (answers, ax):
        ax.axhline(right, color=COLOURS["green"], linestyle=":", label="target")
        ax.plot(range(len(predictions)), predictions, color=COLOURS["blue"], alpha=0.3)
        ax.plot(range(token + 1), predictions[: token + 1], color=COLOURS["blue"], label="prediction with $W_i$")
        ax.plot(token, predictions[token], "o", color=COLOURS["blue"], markersize=9)
        ax.set(title=f"after {token} examples", xlabel="examples read", ylim=answers_range)
        ax.legend(fontsize="small")
    return Row(
        Figure(
            heat,
            f"After {token} tokens: two heat maps. The edit has norm {np.linalg.norm(update):.2f}; the step of the "
            f"last token, taken at the rate {rate:.3f}, has norm {np.linalg.norm(step):.3f}.",
        ),
        Figure(
            answers,
            f"After {token} examples the prediction is {predictions[token]:.3f}; the target is {right:.3f}.",
        ),
    )


def invented_losses(before: Sequence[float], after: Sequence[float], title: str) -> Figure:
    """Losses constructed from given steps, each before its step and after it."""
    token = np.arange(1, len(before) + 1)
    with figure(width=4.1, height=3.2) as (fig, ax):
        ax.plot(token, before, color=COLOURS["purple"], label="before")
        ax.plot(token, after, color=COLOURS["ochre"], label="after")
        ax.set(title=title, xlabel="step", ylabel="its loss")
        ax.legend(ncols=2, **UNDER)
    fell = np.mean(np.asarray(after) < np.asarray(before))
    return Figure(
        fig, f"{title}: the loss of each step before and after it; it falls in {fell:.0%} of {len(token)} steps."
    )


def _banded(ax: Axes, x: Any, series: Estimate, **style: Any) -> None:
    """A curve with a band of one standard error on each side."""
    ax.fill_between(
        x, series.mean - series.error, series.mean + series.error, color=style["color"], alpha=0.25, linewidth=0
    )
    ax.plot(x, series.mean, **style)


def _style(number: int, count: int, control: bool) -> dict[str, str]:
    return {"color": COLOURS["grey"], "linestyle": "--"} if control else {"color": shade(number, count)}
