"""Pictures of given numbers: matplotlib drawings as inline SVG that follow the page's light or dark theme.

A drawing function is three lines: open a :func:`figure`, draw, return a :class:`Figure` with a text alternative.

>>> with figure(width=4, height=2) as (fig, ax):
...     _ = ax.plot([0, 1, 2], [1.0, 0.3, 0.1], color=COLOURS["vermillion"])
>>> Figure(fig, alt="A curve that falls from 1 to 0.1.")
Figure('A curve that falls from 1 to 0.1.')

There is no mathematics here: a picture shows what was computed elsewhere.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import io
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icl_lib.environment import extra
from icl_lib.theorem import weight_update

with extra("figures"):
    import matplotlib
    from cycler import cycler
    from matplotlib import _mathtext
    from matplotlib.axes import Axes
    from matplotlib.colors import to_hex, to_rgb
    from matplotlib.figure import Figure as MatplotlibFigure
    from matplotlib.image import AxesImage
    from matplotlib.ticker import FixedLocator
    from PIL import Image

INK = "#000000"
"""A :class:`Figure` draws everything that is black in the text colour of the page."""

COLOURS = {
    "blue": "#2b7fc4",
    "vermillion": "#d55e00",
    "green": "#009e73",
    "purple": "#b565a7",
    "ochre": "#a97f10",
    "grey": "#808080",
}
"""The colours of the book.

Four of them have a role on every page: with the prompt (vermillion, often :data:`WIDE`), with edited weights (blue),
the truth (green), and bare, without prompt and edit (grey, as all controls). Purple and ochre are free; :func:`shade`
goes from one to the other. Each has a contrast of at least 3 with white and with dark pages. Colour-blind readers can
tell the first three apart."""

STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=list(COLOURS.values())),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.grid": True,
    "axes.axisbelow": True,
    "font.size": 11,
    "grid.alpha": 0.13,
    "grid.color": INK,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
"""The matplotlib settings of every picture; :func:`figure` applies them."""

WIDE = {"color": COLOURS["vermillion"], "linewidth": 7, "alpha": 0.45}
"""A wide pale line, on which another curve can lie and be seen."""

UNDER = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2), "fontsize": "small", "columnspacing": 1}
"""A legend below the axes."""

LEVELS = 65
"""The number of colours of a heat map. It is odd, so that zero has one of its own."""

# A file opened by itself, or shown by a code host, has no page that sets its text colour and font.
_STANDALONE = (
    "<style>svg{color:#1f2328;font-family:system-ui,sans-serif}"
    "@media(prefers-color-scheme:dark){svg{color:#d1d7e0}}</style>"
)


# The rule that matplotlib writes applies to every element of the page, which is slow. The root element says the same.
_GLOBAL_STYLE = r'<defs>\s*<style type="text/css">\*\{stroke-linejoin: round; stroke-linecap: butt\}</style>\s*</defs>'
_STROKES = 'stroke-linejoin="round" stroke-linecap="butt"'


@contextlib.contextmanager
def figure(
    width: float | int = 5.2, height: float | int = 3.2, rows: int = 1, columns: int = 1, **subplots: Any
) -> Iterator[tuple[MatplotlibFigure, Any]]:
    """A styled matplotlib figure and its axes (one, or an array of them) to draw on inside the ``with`` block.

    The figure is not registered with pyplot, so it needs no closing. ``width`` and ``height`` are in inches. The page
    scales a picture down if it is too wide, and never scales it up. Further arguments go to matplotlib's
    ``Figure.subplots`` (``sharex``, ``width_ratios``, …).

    >>> with figure(rows=1, columns=2, sharey=True) as (fig, (left, right)):
    ...     _ = left.plot([1, 2]), right.plot([2, 1])
    """
    with matplotlib.rc_context(STYLE):
        fig = MatplotlibFigure(figsize=(width, height), layout="constrained")
        yield fig, fig.subplots(rows, columns, **subplots)


class Figure:
    """A matplotlib figure as inline SVG, ready for a page, a notebook or a file.

    Black is drawn in the surrounding text colour, so one picture serves light and dark themes. The same drawing always
    gives the same bytes: it contains no date and no counter. Its identifiers begin with a hash of the content, so two
    different pictures on a page share none. It contains no style sheet either: one inside an SVG would apply to the
    whole page. Its axes carry their limits and its curves their names (``data-axes``, ``data-name``), from which a
    script reads the values off the drawing.

    Args:
        fig: the matplotlib figure. A figure made with pyplot is closed, so that a notebook does not show it twice.
        alt: what the picture shows, in words, for readers who cannot see it.

    Raises `ValueError` if ``fig`` is not a matplotlib figure or ``alt`` is empty.

    >>> with figure() as (fig, ax):
    ...     _ = ax.plot([0, 1])
    >>> picture = Figure(fig, alt="a rising line")
    >>> 'role="img" aria-label="a rising line"' in picture.svg, "currentColor" in picture.svg
    (True, True)
    """

    def __init__(self, fig: Any, alt: Any) -> None:
        if not isinstance(fig, MatplotlibFigure):
            raise ValueError(f"fig is a {type(fig).__name__}: give a matplotlib figure, for example plt.gcf().")
        if not isinstance(alt, str) or not alt.strip():
            raise ValueError(f"alt is {alt!r}: say in a sentence what the picture shows.")
        self.alt: str = alt
        self.svg: str = _themed(_draw(fig), alt)

    def _repr_html_(self) -> str:
        return f'<div class="icl-figure" style="overflow-x:auto">{self.svg}</div>'

    def __repr__(self) -> str:
        return f"Figure({self.alt!r})"

    def save(self, path: str | Path) -> None:
        """Write a standalone SVG file, which also follows the reader's light or dark setting."""
        Path(path).write_text(self.svg.replace(">", f">{_STANDALONE}", 1) + "\n", encoding="utf-8")


class Row:
    """Pictures side by side, or one below the other where the page is too narrow for that.

    >>> with figure(width=3) as (fig, ax):
    ...     _ = ax.plot([0, 1])
    >>> picture = Figure(fig, alt="a rising line")
    >>> Row(picture, picture)._repr_html_().count("<svg")
    2
    """

    def __init__(self, *pictures: Figure) -> None:
        self.pictures = pictures

    def _repr_html_(self) -> str:
        style = "display:flex;flex-wrap:wrap;justify-content:center;gap:0.5rem 1rem"
        inner = "".join(picture._repr_html_() for picture in self.pictures)
        return f'<div class="icl-row" style="{style}">{inner}</div>'


def heat_map(ax: Axes, matrix: Any, limit: float | int, numbers: bool = False, **style: Any) -> AxesImage:
    """Draw a matrix in colours from ``-limit`` to ``limit``, with its numbers if asked for.

    >>> with figure() as (fig, ax):
    ...     picture = heat_map(ax, [[-0.5, 1.0]], limit=1, numbers=True)
    >>> print(ax.texts[0].get_text(), picture.get_cmap().name)
    −0.50 PuOr
    """
    colours = matplotlib.colormaps[style.pop("cmap", "PuOr")].resampled(LEVELS)
    # Without interpolation the file has one pixel for each entry.
    picture = ax.imshow(matrix, colours, **{"vmin": -limit, "vmax": limit, "interpolation": "none", **style})
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    for (i, j), value in np.ndenumerate(matrix) if numbers else ():
        colour = "#ffffff" if abs(value) > 0.6 * limit else "#111111"
        ax.annotate(signed(value, ".2f"), (j, i), ha="center", va="center", color=colour, fontsize="small")
    return picture


def colour_of(number: int) -> str:
    """The colours of the series in turn, without grey, which is for controls."""
    return list(COLOURS.values())[number % (len(COLOURS) - 1)]


def shade(number: int, count: int) -> str:
    """The colour of a series that has no role, such as a block's or a precision's: from purple to ochre in order.

    >>> shade(0, 5) == COLOURS["purple"], shade(4, 5) == COLOURS["ochre"]
    (True, True)
    """
    first, last = (to_rgb(COLOURS[name]) for name in ("purple", "ochre"))
    part = number / max(count - 1, 1)
    return to_hex([(1 - part) * a + part * b for a, b in zip(first, last, strict=True)])


def signed(value: float | int, form: str = "g") -> str:
    """Write a number with the minus sign of the axes."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _draw(fig: MatplotlibFigure) -> str:
    """The bare ``<svg>`` element that matplotlib writes."""
    buffer, marks = io.StringIO(), {}
    for ax in fig.axes:
        lines = {_plain(line.get_label()): line for line in ax.lines if not line.get_label().startswith("_")}
        curves = [line for line in ax.lines if len(line.get_xdata()) > 2]
        if not lines and curves:
            lines = {_plain(ax.get_ylabel() or ax.get_title(loc="left")): curves[0]}
        for name, line in lines.items():
            line.set_gid(f"icl-mark-{len(marks)}")
            marks[line.get_gid()] = f'data-name="{html.escape(name)}"'
        if curves or ax.images:
            ax.set_gid(f"icl-mark-{len(marks)}")
            marks[ax.get_gid()] = f'data-axes="{html.escape(json.dumps(_facts(ax), ensure_ascii=False))}"'
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "icl_lib"}), _large_exponents(fig):
        fig.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    if getattr(fig, "number", None) is not None:
        from matplotlib import pyplot  # only a figure of pyplot has a number, so pyplot is already imported

        pyplot.close(fig)
    text = re.sub(r'id="(icl-mark-\d+)"', lambda found: marks[found[1]], buffer.getvalue())
    return text[text.index("<svg") :].strip()


@contextlib.contextmanager
def _large_exponents(fig: MatplotlibFigure) -> Iterator[None]:
    """Write the exponents of logarithmic axes larger than matplotlib, which has no setting for it: for phones."""
    shrink = _mathtext.SHRINK_FACTOR
    if any("log" in ax.get_xscale() + ax.get_yscale() for ax in fig.axes):
        _mathtext.SHRINK_FACTOR = 0.85
    try:
        yield
    finally:
        _mathtext.SHRINK_FACTOR = shrink


def _facts(ax: Axes) -> dict[str, Any]:
    """What a script needs to read values off the drawing of these axes."""
    facts: dict[str, Any] = {
        name: {
            "label": _plain(getattr(ax, f"get_{name}label")()),
            "limits": [float(f"{end:.9g}") for end in getattr(ax, f"get_{name}lim")()],
            "scale": getattr(ax, f"get_{name}scale")(),
        }
        for name in "xy"
    }
    facts["title"] = _plain(ax.get_title(loc="left"))
    for picture in ax.images[:1]:
        colours = picture.get_cmap()(range(picture.get_cmap().N), bytes=True)[:, :3]
        facts["heat"] = {"limits": picture.get_clim(), "colours": [bytes(colour).hex() for colour in colours]}
        for name, count in zip("yx", picture.get_size(), strict=True):
            axis = getattr(ax, f"{name}axis")
            chosen = isinstance(axis.get_major_locator(), FixedLocator)  # others are numbers at round places
            names = [label.get_text() for label in axis.get_ticklabels()] if chosen else []
            if len(names) == count:
                facts[name]["names"] = names
    return facts


def _plain(text: str) -> str:
    """A label in plain text: without the marks of a formula, and with its Greek letters."""

    def letter(command: re.Match[str]) -> str:
        try:
            return unicodedata.lookup(f"GREEK SMALL LETTER {command[1].replace('lambda', 'lamda')}")  # Unicode's name
        except KeyError:
            return command[1]

    def formula(found: re.Match[str]) -> str:
        text = re.sub(r"\\([a-z]+)", letter, re.sub(r"[{}]|\\,", "", found[1]))
        return text.replace("-", "\N{MINUS SIGN}")

    return re.sub(r"\$([^$]*)\$", formula, text)


def _indexed(png: re.Match[str]) -> str:
    """An image with few colours, written with a palette: a fraction of its size."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(png[1]))).convert("RGBA"))
    colours, index = np.unique(pixels.reshape(-1, 4), axis=0, return_inverse=True)
    if len(colours) > 256 or colours[:, 3].min() < 255:
        return png[0]
    image = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8), "P")
    image.putpalette(colours[:, :3].tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return f'base64,{base64.b64encode(buffer.getvalue()).decode()}"'


def _themed(svg: str, alt: str) -> str:
    """The same picture in the page's text colour and font, with identifiers of its own and coordinates rounded."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(_GLOBAL_STYLE, "", svg, count=1)
    svg = re.sub(r'base64,([^"]+)"', _indexed, svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'\b(?:d|x|y|transform)="(?!matrix|scale)[^"]*"', lambda m: re.sub(r"(\.\d{2})\d+", r"\1", m[0]), svg)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    prefix = f"f{hashlib.sha256((alt + svg).encode()).hexdigest()[:10]}-"
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    width = re.search(r'width="([\d.]+)pt"', svg)[1]
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    style = f"width:{float(width) * 4 / 3:.0f}px;max-width:100%;height:auto;display:block;margin:auto"
    head = f'<svg role="img" aria-label="{html.escape(alt)}" fill="currentColor" {_STROKES} style="{style}" '
    return svg.replace("<svg ", head, 1)


PLANE_EXAMPLE = {"W": ((1.0, 0.5), (-0.3, 0.9)), "a": (1.5, 0.4), "d": (-0.6, 1.0)}
"""The layer and the activations that :class:`~icl_lib.widgets.Playground` starts from and that the README shows."""


def rank_one_picture(W: Any, a: Any, d: Any) -> Figure:
    r"""What a prompt does to a layer of two units, and the rank-one edit that does the same: two planes side by side.

    Left, the inputs of the layer: ``a`` ($a_0$, without the context) and ``a + d`` ($a_C$, with it). Right, its
    outputs: $W a_0$, $W a_C$ and $(W + \Delta W)\,a_0$, with $\Delta W$ from :func:`icl_lib.theorem.weight_update`.

    Shapes: ``W`` ``[2, 2]``, ``a`` and ``d`` ``[2]``; anything that `torch.as_tensor` takes. Raises `ValueError` for
    other shapes, for numbers that are not finite and for a zero ``a``.

    >>> rank_one_picture(**PLANE_EXAMPLE).alt[:30]
    'Two planes. Left, the input: a'
    """
    W, a, d = (plane_array(name, value) for name, value in (("W", W), ("a", a), ("d", d)))
    with figure(width=6.6, height=3.1, columns=2) as (fig, planes):
        draw_rank_one(planes, W, a, d)
    a_0, a_C, Wa_0, Wa_C = (f"({v[0]:.2f}, {v[1]:.2f})" for v in (a, a + d, W @ a, W @ (a + d)))
    return Figure(
        fig,
        f"Two planes. Left, the input: a₀ = {a_0} without the context, a_C = {a_C} with it. Right, the output: W a₀ = "
        f"{Wa_0} without the edit; with it, (W + ΔW) a₀ = W a_C = {Wa_C}.",
    )


def draw_rank_one(planes: Any, W: Any, a: Any, d: Any) -> None:
    """Draw :func:`rank_one_picture` on two axes of matplotlib's.

    >>> with figure(columns=2) as (fig, planes):
    ...     draw_rank_one(planes, **PLANE_EXAMPLE)
    >>> planes[1].get_title(loc="left")
    'what the layer outputs'
    """
    left, right = planes
    W, a, d = (plane_array(name, value) for name, value in (("W", W), ("a", a), ("d", d)))
    weight, a_0, a_C = (torch.as_tensor(value) for value in (W, a, a + d))
    edited = (weight + weight_update(weight, a_0, a_C).dense()) @ a_0
    _plane(left, "what the layer reads", 1.15 * max(np.abs(a).max(), np.abs(a + d).max()))
    _arrow(left, a, COLOURS["grey"], "$a_0$")
    _arrow(left, a + d, COLOURS["vermillion"], "$a_C$")
    _arrow(left, a + d, INK, "δ", start=a, alpha=0.55, linewidth=1, linestyle=(0, (4, 3)))
    _plane(right, "what the layer outputs", 1.15 * max(np.abs(W @ a).max(), np.abs(W @ (a + d)).max()))
    _arrow(right, W @ a, COLOURS["grey"], "$W a_0$")
    _arrow(right, W @ (a + d), COLOURS["vermillion"], "", arrowstyle="-", linewidth=7, alpha=0.4)
    _arrow(right, edited.numpy(), COLOURS["blue"], "$W a_C = (W + ΔW)\\, a_0$")


def plane_array(name: str, value: Any) -> np.ndarray:
    """``W`` as a ``[2, 2]`` array of finite numbers, ``a`` or ``d`` as ``[2]``. Raises `ValueError` for anything else.

    >>> plane_array("a", (1, 2))
    array([1., 2.])
    """
    shape = (2, 2) if name == "W" else (2,)
    try:
        array = torch.as_tensor(value, dtype=torch.float64).detach().cpu().numpy()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} is {value!r}: give numbers of shape {shape}.") from None
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}: the figure shows a plane, so give shape {shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"{name}{np.argwhere(~np.isfinite(array))[0].tolist()} is not finite: give finite numbers.")
    return array


def _plane(ax: Axes, title: str, reach: float) -> None:
    ax.set(title=title, aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach), xticklabels=[], yticklabels=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.axhline(0, color=INK, alpha=0.35, linewidth=0.8)
    ax.axvline(0, color=INK, alpha=0.35, linewidth=0.8)


def _arrow(ax: Axes, tip: np.ndarray, colour: str, label: str, start: Any = (0, 0), **style: Any) -> None:
    style = {"arrowstyle": "-|>", "linewidth": 2.2, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0, **style}
    ax.annotate("", tip, start, arrowprops={"color": colour, **style})
    at = (np.asarray(start) + tip) / 2 if np.any(start) else tip
    side = "left" if at[0] >= 0 else "right"
    ax.annotate(label, at, xytext=(6 if side == "left" else -6, 3), textcoords="offset points", ha=side, color=colour)
