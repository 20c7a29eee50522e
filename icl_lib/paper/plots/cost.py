"""Figures of cost: how time grows with the width, the context length and the depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.figures import COLOURS, Figure, Row, figure

SERIES = (("verify", "verification", "o", COLOURS["purple"]), ("forward", "forward pass", "s", COLOURS["ochre"]))


def scaling(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Draw time over size on logarithmic axes, one figure for each row, with lines as the operations grow.

    A row has an ``axis`` and its ``size``. For ``verify`` and ``forward`` it has the ``seconds`` (lower quartile,
    median, upper quartile), the ``operations``, and the exponents ``fitted``, its ``standard error``, and
    ``predicted``. The line of the operations passes through the median at the largest size, so only its slope is a
    prediction.
    """
    return Row(*(_growth(row) for row in rows))


def _growth(row: Mapping[str, Any]) -> Figure:
    with figure(width=3.2, height=3.3) as (fig, ax):
        for name, label, marker, colour in SERIES:
            low, median, high = 1e3 * np.transpose(row[name]["seconds"])
            count = np.array(row[name]["operations"])
            predicted = count * median[-1] / count[-1]
            ax.plot(row["size"], predicted, color=colour, alpha=0.55, linewidth=1.4)
            ax.errorbar(row["size"], median, (median - low, high - median), fmt=marker, color=colour, label=label)
        ax.set(xscale="log", yscale="log", xlabel=row["axis"], ylabel="milliseconds")
        ax.set_xticks(row["size"], [f"{size}" for size in row["size"]], fontsize="small")
        ax.minorticks_off()
        ax.legend(fontsize="small")
    exponents = "; ".join(
        f"{label} {row[name]['fitted']:.2f} ± {row[name]['standard error']:.2f}, "
        f"its operations {row[name]['predicted']:.2f}"
        for name, label, *_ in SERIES
    )
    return Figure(fig, f"Time over {row['axis']}, on logarithmic axes, with lines as operations grow. {exponents}.")
