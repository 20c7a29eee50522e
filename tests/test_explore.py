"""The explorers of a page without a kernel, in a real browser: values, links, the play button, the keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
from browser import Visit, settle, visiting
from playwright.sync_api import Browser, Locator, expect
from widgets_page import widgets_page

from icl_lib.paper.figures import COLOURS, Figure, Row, figure, heat_map
from icl_lib.widgets import explore

X = np.linspace(0, 10, 11)
MATRIX = np.random.default_rng(0).normal(size=(7, 5)).clip(-2, 2)


def curves(k):
    with figure(width=3) as (left, ax):
        ax.plot(X, k * X**2, label="square")
        ax.axhline(25, label="level", color=COLOURS["grey"])
        ax.set(xlabel="time $\\mu$", ylim=(0, 400))
    with figure(width=3) as (right, ax):
        ax.plot(X, 10.0 ** (k - X), "o", label="fall")
        ax.set(xlabel="time $\\mu$", yscale="log", title="dots")
        ax.set_xlim(left.axes[0].get_xlim())
    return Row(Figure(left, f"curve {k}"), Figure(right, f"dots {k}"))


def matrices(k, sign):
    with figure(columns=2) as (fig, axes):
        for ax, matrix, title in zip(axes, (MATRIX, k * MATRIX), ("one", "times k"), strict=True):
            heat_map(ax, (1 if sign == "plus" else -1) * matrix, 6)
            ax.set(title=title, xlabel="column")
    return Figure(fig, f"matrices {k} {sign}")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICL_LIB_BOOK_BUILD", "1")
        views = [explore(curves, k=[1, 2, 3, 4]), explore(matrices, k=[1, 2, 3], sign=["plus", "minus"])]
    return widgets_page(tmp_path_factory.mktemp("explore"), *(view._repr_html_() for view in views))


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    with visiting(browser, address) as visit:
        visit.page.goto(f"{address}/index.html")
        settle(visit.page)
        yield visit
        assert visit.problems() == []


def explorer(visit: Visit, n: int) -> Locator:
    return visit.page.locator(".icl-explore").nth(n)


def numbers(text: str) -> list[float]:
    """The numbers of a text such as "1.5 × 10⁻³, −2"."""
    plain = text.replace("\N{MINUS SIGN}", "-")
    found = re.findall(r"(-?\d+(?:\.\d+)?)(?: × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+))?", plain)
    return [float(m) * 10.0 ** int(e.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0) for m, e in found]


def test_values_are_those_of_the_data(visit):
    """Along linked pictures, by keyboard, at two states of the slider."""
    curve = explorer(visit, 0)
    frame, said = curve.locator(".icl-frame"), curve.locator(".icl-said")
    for k in (1, 2):
        frame.focus()
        for x in X:
            frame.press("ArrowRight")
            expect(said).to_contain_text(f"time μ {x:g}.")
            assert "square" in said.inner_text()
            time, square, level, fall = numbers(said.inner_text())
            np.testing.assert_allclose(
                [time, square, level, fall], [x, k * x**2, 25, 10.0 ** (k - x)], rtol=0.02, atol=0.3
            )
        curve.get_by_role("slider").press("ArrowRight")
    assert curve.locator(".icl-mark").count() == 0, "the marks go with the focus"


def test_heat_maps_are_read_by_the_mouse(visit):
    heat = explorer(visit, 1)
    heat.get_by_role("slider").press("End")
    box = heat.locator("image").first.bounding_box()
    for i, j in ((0, 0), (3, 4), (6, 2)):
        visit.page.mouse.move(box["x"] + (j + 0.5) / 5 * box["width"], box["y"] + (i + 0.5) / 7 * box["height"])
        expect(heat.locator(".icl-said")).to_contain_text(f"row {i + 1}, column {j + 1}. one: ")
        one, times = numbers(heat.locator(".icl-said").inner_text())[2:]
        np.testing.assert_allclose(
            [one, times], [MATRIX[i, j], 3 * MATRIX[i, j]], atol=6 / 65 + 0.05
        )  # half a colour, and the rounding
        assert heat.locator(".icl-mark rect").count() == 2
    visit.page.mouse.move(1, 1)
    expect(heat.locator(".icl-said")).to_be_empty()


def test_a_state_has_an_address(visit, address):
    curve, heat = explorer(visit, 0), explorer(visit, 1)
    heat.get_by_role("slider").press("ArrowRight")
    heat.get_by_text("minus").click()
    visit.page.wait_for_url("**#k=2&sign=minus")
    visit.page.goto("about:blank")
    visit.page.goto(f"{address}/index.html#k=3&sign=minus")
    settle(visit.page)
    expect(heat.locator("svg[role=img]")).to_have_attribute("aria-label", "matrices 3 minus")
    expect(curve.get_by_role("slider")).to_have_attribute("aria-valuetext", "3")
    visit.page.evaluate("location.hash = 'k=1&sign=plus'")
    expect(heat.locator("svg[role=img]")).to_have_attribute("aria-label", "matrices 1 plus")
    visit.page.evaluate("location.hash = 'k=9&sign=plus'")
    expect(heat.locator("svg[role=img]")).to_have_attribute("aria-label", "matrices 1 plus")


def test_frames_are_played_and_announced(visit):
    curve = explorer(visit, 0)
    curve.get_by_role("button", name="Play").click()
    curve.get_by_role("button", name="Pause").click()
    expect(curve.get_by_role("slider")).to_have_attribute("aria-valuetext", "2")
    expect(curve.locator("[aria-live]")).to_have_text("curve 2 dots 2")
    curve.get_by_role("button", name="Play").click()
    expect(curve.get_by_role("button", name="Play")).to_be_visible(timeout=5000)
    expect(curve.get_by_role("slider")).to_have_attribute("aria-valuetext", "4")
