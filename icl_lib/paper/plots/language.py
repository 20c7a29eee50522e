"""Pictures of the edits of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.paper.figures import Figure, figure, heat_map


def written(sizes: Any, tokens: Sequence[str], title: str, largest: float | None = None) -> Figure:
    """Draw the size of each block's edits at each token as a heat map.

    Args:
        sizes: ``[blocks, tokens]``.
        tokens: the labels of the columns.
        title: of the figure.
        largest: the upper end of the colour scale, so that several figures can share one; by default the largest size.
    """
    sizes = np.asarray(sizes)
    with figure(width=6.4, height=2.6) as (fig, ax):
        picture = heat_map(ax, sizes, largest or sizes.max(), cmap="viridis", vmin=0, aspect="auto")
        ax.set(title=title, ylabel="block")
        ax.set_xticks(range(len(tokens)), tokens)
        ax.set_yticks(range(len(sizes)), [str(block + 1) for block in range(len(sizes))])
        ax.tick_params(length=0)
        fig.colorbar(picture, ax=ax, shrink=0.9, label="norm of the edits")
    block, token = np.unravel_index(sizes.argmax(), sizes.shape)
    return Figure(
        fig,
        f"{title}: heat map of the size of the edits, {len(sizes)} blocks by {len(tokens)} tokens. The largest, "
        f"{sizes.max():.2g}, is in block {block + 1} at token {token + 1}, {tokens[token]!r}.",
    )


def stream_sizes(sizes: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the norm of the residual stream after each block, one curve for each token of a run."""
    with figure(width=5.6, height=3.4) as (fig, ax):
        for (name, norms), style in zip(sizes.items(), ("-", "-", "-", "--"), strict=False):
            ax.plot(range(1, len(norms) + 1), norms, style, label=name)
        ax.set(yscale="log", xlabel="block", ylabel="norm of the stream")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize="small", ncols=1)
    largest = "; ".join(f"{name}: at most {max(norms):.3g}" for name, norms in sizes.items())
    return Figure(fig, f"Norm of the residual stream after each of {len(norms)} blocks. {largest}.")
