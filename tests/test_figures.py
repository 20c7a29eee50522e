"""Figures: the same bytes every time, the page's colours, and errors that name a remedy."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from icl_lib.paper.figures import (
    COLOURS,
    INK,
    PLANE_EXAMPLE,
    Figure,
    _draw,
    _plain,
    figure,
    heat_map,
    plane_array,
    rank_one_picture,
    shade,
)


def curve(slope: float = 1.0, alt: str = "a line") -> Figure:
    with figure(width=4, height=2) as (fig, ax):
        ax.plot([0, 1, 2], [0, slope, 2 * slope], marker="o", label="line")
        ax.fill_between([0, 1], [0, 0], [1, 1], hatch="//")
        ax.set(title="‖ΔW‖ & <others>", yscale="symlog")
        ax.legend()
    return Figure(fig, alt)


def identifiers(svg: str) -> set[str]:
    return set(re.findall(r'\bid="([^"]+)"', svg))


@pytest.mark.slow
def test_a_drawing_gives_the_same_bytes_again():
    assert curve().svg == curve().svg
    code = "from icl_lib.paper.figures import *; print(rank_one_picture(**PLANE_EXAMPLE).svg)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == rank_one_picture(**PLANE_EXAMPLE).svg


def test_two_figures_share_no_identifier():
    first, second = curve(1.0), curve(2.0)
    assert identifiers(first.svg)
    assert not identifiers(first.svg) & identifiers(second.svg)


def test_references_stay_inside_the_figure():
    svg = curve().svg
    used = re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', svg)
    assert used
    assert {a or b for a, b in used} == identifiers(svg)


def drawn_in(page, svg: str) -> list[int]:
    """The pixels of a picture on a white page."""
    page.set_content(f"<body style='margin:0;background:white'>{svg}</body>")
    return list(page.locator("svg").screenshot())


def test_a_picture_styles_nothing_outside_itself(browser):
    """A style sheet in an inline SVG applies to the whole page, and each frame of an explorer would restyle it."""
    with figure(width=4, height=2) as (fig, ax):
        ax.plot([0, 1, 2, 1.9], [0, 1, 0, 1], marker="v", linewidth=9)
        ax.bar([0, 1], [1, 2], hatch="//", edgecolor=INK)
        ax.scatter([0.2, 0.4], [0.5, 1.5], marker="x", linewidth=5)
        ax.errorbar([1, 2], [1, 1], yerr=0.3, capsize=5)
    rule = re.search(r"<style.*?</style>", _draw(fig))
    assert rule, "the control: matplotlib writes no style sheet, and nothing need be removed"
    svg = Figure(fig, "lines with ends and corners").svg
    assert "<style" not in svg
    root = re.search(r"<svg [^>]*>", svg)[0]
    with_rule = svg.replace(root, root + rule[0])
    bare = svg.replace('stroke-linejoin="round"', "", 1)
    page = browser.new_page()
    try:
        assert drawn_in(page, svg) == drawn_in(page, with_rule)
        assert drawn_in(page, bare) != drawn_in(page, with_rule), "the control: without the attributes corners differ"
    finally:
        page.close()


def test_ink_follows_the_page_and_series_keep_their_colours():
    svg = curve().svg
    assert INK not in svg
    assert svg.count("currentColor") > 5
    assert COLOURS["blue"] in svg
    assert "white" not in svg
    assert "#ffffff" not in svg


def test_html_is_accessible_and_responsive():
    html = curve(alt='one "line" & <more>')._repr_html_()
    head = re.search(r"<svg [^>]*>", html)[0]
    assert 'role="img"' in head
    assert 'aria-label="one &quot;line&quot; &amp; &lt;more&gt;"' in head
    assert "viewBox=" in head
    assert "max-width:100%" in head
    assert not re.search(r'\s(?:width|height)="', head)
    assert not re.search(r"\d{4}-\d{2}-\d{2}|matplotlib", html), "a date or a version would change the bytes"


def test_saved_file_stands_alone(tmp_path):
    path = tmp_path / "picture.svg"
    curve().save(path)
    text = path.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme:dark" in text
    assert not re.search(r"https?://(?!www\.w3\.org/)", text)


def test_figure_of_pyplot_is_closed(monkeypatch):
    monkeypatch.setattr(matplotlib, "get_backend", lambda: "agg")
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")
    fig, ax = plt.subplots()
    ax.plot([0, 1], color="black")
    assert "currentColor" in Figure(fig, "a line").svg
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("fig", "alt", "message"),
    [
        ("a figure", "alt", "fig is a str: give a matplotlib figure"),
        (None, "alt", "fig is a NoneType"),
        ("real", "", "alt is '': say in a sentence"),
        ("real", "  ", "say in a sentence"),
        ("real", None, "alt is None"),
    ],
)
def test_bad_figures(fig, alt, message):
    if fig == "real":
        with figure() as (fig, _):
            pass
    with pytest.raises(ValueError, match=message):
        Figure(fig, alt)


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("page", ["#ffffff", "#121212", "#111111"], ids=["light", "dark book", "dark JupyterLab"])
@pytest.mark.parametrize("colour", [*COLOURS.values(), *(shade(number, 5) for number in range(1, 4))])
def test_colours_read_on_light_and_dark_pages(colour, page):
    high, low = sorted((luminance(colour), luminance(page)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 3


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ np.clip(rgb, 0, 1) / to_xyz.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira, Fernandes (2009), severity 1, for linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
}


@pytest.mark.parametrize("sight", SIGHT)
def test_first_colours_differ_for_the_colour_blind(sight):
    seen = {name: lab(SIGHT[sight] @ linear(colour)) for name, colour in list(COLOURS.items())[:3]}
    for one in seen:
        for other in seen:
            if one < other:
                assert np.linalg.norm(seen[one] - seen[other]) > 20, f"{one} and {other}"


def test_rank_one_picture_takes_what_holds_numbers():
    lists = rank_one_picture([[1, 0.5], [-0.25, 1]], [1, 0.5], [-0.5, 1])
    arrays = rank_one_picture(np.array([[1, 0.5], [-0.25, 1]]), torch.tensor([1, 0.5]), (-0.5, 1))
    assert lists.svg == arrays.svg
    assert lists.alt.startswith("Two planes.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W": [1, 2]}, r"W has shape \(2,\).* give shape \(2, 2\)"),
        ({"a": [1, 2, 3]}, r"a has shape \(3,\)"),
        ({"d": "up"}, "d is 'up': give numbers"),
        ({"d": [0.0, float("nan")]}, r"d\[1\] is not finite"),
        ({"W": [[1, 0], [float("inf"), 1]]}, r"W\[1, 0\] is not finite"),
        ({"a": [0, 0]}, "zero"),
    ],
)
def test_rank_one_picture_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        rank_one_picture(**{**PLANE_EXAMPLE, **changes})


def test_plane_array_copies_nothing_wrong():
    assert plane_array("W", torch.eye(2, requires_grad=True)).tolist() == [[1, 0], [0, 1]]


def test_a_heat_map_has_a_pixel_for_each_entry_and_a_palette():
    matrix = np.random.default_rng(0).normal(size=(20, 12)).clip(-2, 2)
    matrix[3, 4] = 0
    with figure() as (fig, ax):
        heat_map(ax, matrix, limit=2)
    svg = Figure(fig, "numbers").svg
    with Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', svg)[1]))) as image:
        assert (image.mode, image.size) == ("P", (12, 20))
        pixels = np.asarray(image.convert("RGB"))
    heat = json.loads(html.unescape(re.search(r'data-axes="([^"]+)"', svg)[1]))["heat"]
    levels = np.vectorize(lambda *rgb: heat["colours"].index(bytes(rgb).hex()))(*np.moveaxis(pixels, -1, 0).astype(int))
    read = -2 + 4 * (levels + 0.5) / len(heat["colours"])
    np.testing.assert_allclose(read, matrix, atol=4 / len(heat["colours"]))
    assert read[3, 4] == pytest.approx(0, abs=1e-12), "zero has a colour of its own"
    assert np.abs(read - matrix[::-1]).max() > 1, "the control: upside down"


@pytest.mark.parametrize(
    ("label", "plain"),
    [(r"rate, $1/\lambda$", "rate, 1/λ"), (r"$\mu_{ij}\, W - 1$", "μ_ij W − 1"), ("5 $ and {6}", "5 $ and {6}")],
)
def test_labels_in_plain_text(label, plain):
    assert _plain(label) == plain


@pytest.mark.parametrize(("scale", "least"), [("log", 9.3), ("linear", 7.6)])
def test_the_exponents_of_a_logarithmic_axis_are_large_enough_for_a_phone(scale, least):
    with figure() as (fig, ax):
        ax.plot([1, 2], [1e-9, 1])
        ax.set(yscale=scale, xlabel="$x_1$")
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", Figure(fig, "a line").svg)]
    assert least < min(sizes) < least + 0.2
