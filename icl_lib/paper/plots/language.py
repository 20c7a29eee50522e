"""Pictures of the edits of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from icl_lib.measures import scientific
from icl_lib.paper.figures import COLOURS, INK, UNDER, WIDE, Figure, figure, heat_map, shade


def written(
    sizes: Mapping[str, Any], tokens: Sequence[str], title: str, largest: Mapping[str, float] | None = None
) -> Figure:
    """Draw the size of the edits at each token in each block: one heat map for each kind of edit, side by side.

    Args:
        sizes: for each kind of edit ``[blocks, tokens]``.
        tokens: the labels of the rows, from top to bottom.
        title: of the figure.
        largest: for each kind the upper end of its colour scale, so that several figures can share it; by default the
            largest size.
    """
    said = []
    with figure(width=4.1, height=1.6 + 0.21 * len(tokens), columns=len(sizes), sharey=True) as (fig, axes):
        for ax, (kind, given) in zip(np.atleast_1d(axes), sizes.items(), strict=True):
            matrix = np.asarray(given).T
            top = largest[kind] if largest else matrix.max()
            picture = heat_map(ax, matrix, top, cmap="viridis", vmin=0, aspect="auto")
            ax.set(title=f"{kind} edits", xlabel="block")
            ax.set_xticks(range(matrix.shape[1]), [str(block + 1) for block in range(matrix.shape[1])])
            ax.set_yticks(range(len(tokens)), tokens)
            ax.tick_params(length=0)
            fig.colorbar(picture, ax=ax, orientation="horizontal", label="norm of the edits")
            token, block = np.unravel_index(matrix.argmax(), matrix.shape)
            said.append(
                f"The largest of the {kind} edits, {matrix.max():.2g}, is in block {block + 1} at token {token + 1}, "
                f"{tokens[token]!r}."
            )
        fig.suptitle(title)
    return Figure(fig, f"{title}: size of the edits at {len(tokens)} tokens, as heat maps. {' '.join(said)}")


def stream_sizes(sizes: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the norm of the residual stream after each block, one curve for each token of a run.

    The first two are those of a token with the prompt and bare; the others have no role.
    """
    roles = (WIDE, {"color": COLOURS["grey"], "linestyle": "--"})
    with figure(width=4.1, height=3.6) as (fig, ax):
        for number, (name, norms) in enumerate(sizes.items()):
            style = roles[number] if number < 2 else {"color": shade(number - 2, len(sizes) - 2)}
            ax.plot(range(1, len(norms) + 1), norms, label=name, **style)
        ax.set(yscale="log", xlabel="block", ylabel="norm of the stream")
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), fontsize="small", ncols=1)
    largest = "; ".join(f"{name}: at most {scientific(max(norms), 2)}" for name, norms in sizes.items())
    return Figure(fig, f"Norm of the residual stream after each of {len(norms)} blocks. {largest}.")


def answer_squares(pairs: Any, right: Mapping[str, Any], compiled: int) -> Figure:
    """Draw which questions a + b are answered rightly: one square for each question, one plane for each run.

    Args:
        pairs: the numbers of each question, ``[questions, 2]``, from 1 to 9.
        right: for each run, whether each answer is right, ``[questions]``.
        compiled: how many of the questions, from the first, the edit was made from; they have a frame.
    """
    places, said = np.asarray(pairs), []
    with figure(width=2.9 * len(right) + 0.6, height=3.6, columns=len(right)) as (fig, axes):
        for ax, (name, good) in zip(np.atleast_1d(axes), right.items(), strict=True):
            good = np.asarray(good)
            for wanted, colour, label in ((True, "green", "right"), (False, "grey", "wrong")):
                a, b = places[good == wanted].T
                ax.scatter(a, b, s=90, marker="s", color=COLOURS[colour], alpha=0.9 if wanted else 0.3, label=label)
            ax.scatter(*places[:compiled].T, s=130, marker="s", facecolors="none", edgecolors=INK, label="in the edit")
            ax.set(title=name, xlabel="a", ylabel="b", xticks=range(1, 10), yticks=range(1, 10), aspect="equal")
            ax.grid(False)
            new = good[compiled:]
            said.append(
                f"{name}: {good[:compiled].sum()} of {compiled} right in the edit, {new.sum()} of {len(new)} new"
            )
        np.atleast_1d(axes)[0].legend(ncols=3, **UNDER)
    return Figure(fig, "Squares for the questions a + b, right or wrong. " + "; ".join(said) + ".")
