"""The widget of one attention head in a real browser, beside the library; and what the playground learned with it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from browser import CONTRASTS, Visit, settle, visiting
from playwright.sync_api import Browser, Locator, expect
from widgets_page import widgets_page

from icl_lib.dynamics import normalised_lms, trajectory
from icl_lib.widgets import AttentionHead, Playground
from icl_lib.widgets.page import module

EXACT = 1e-12


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICL_LIB_BOOK_BUILD", "1")
        shown = [widget._repr_mimebundle_()[0]["text/html"] for widget in (AttentionHead(), Playground())]
    return widgets_page(tmp_path_factory.mktemp("head"), *shown)


@pytest.fixture
def visit(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    with visiting(browser, address, **getattr(request, "param", {})) as visit:
        visit.page.goto(f"{address}/index.html")
        settle(visit.page)
        yield visit
        assert visit.problems() == []


@pytest.fixture
def head(visit: Visit) -> Locator:
    return visit.page.locator(".icl-attention")


@pytest.fixture
def playground(visit: Visit) -> Locator:
    return visit.page.locator(".icl-playground")


def residual(head: Locator, name: str) -> float:
    return float(head.locator(f"[data-{name}]").get_attribute(f"data-{name}"))


def token(head: Locator, i: int) -> Locator:
    return head.locator(".icl-token").nth(i)


def test_numbers_are_those_of_the_library(visit):
    """The steps of the browser are gradient steps on each token's loss; the library has them in closed form."""
    visit.page.evaluate(
        "async (text) => { globalThis.head = (await import(URL.createObjectURL(new Blob([text],"
        " {type: 'text/javascript'})))).default; }",
        module("attention"),
    )
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 8):
        for uniform in (False, True):
            widget = AttentionHead(
                *rng.normal(size=(1, 2, 2)), rng.normal(size=(n, 2)), *rng.normal(size=(2, 2)), uniform
            )
            state = {name: getattr(widget, name) for name in ("W", "tokens", "query", "other", "uniform")}
            seen = visit.page.evaluate("(state) => head.attend(state)", state)
            block = widget.block()
            tokens, query, other = (
                torch.tensor(value, dtype=torch.float64) for value in (widget.tokens, widget.query, widget.other)
            )
            path = trajectory(block, tokens, query)
            lms = normalised_lms(path)

            def column(name, steps=seen["steps"]):
                return [step[name] for step in steps]

            close = {
                "a": (column("a"), path.activations[1:]),
                "rates": (column("rate"), lms.rates[:, 0]),
                "before": (column("before"), lms.before[:, 0]),
                "after": (column("after"), lms.after[:, 0]),
                "steps": (column("length"), path.marginal_norms),
                "edit": (seen["edit"], path.updates[-1].dense()),
                "outputs": (column("output")[-1], block(tokens, query)),
                "wanted": (seen["wanted"], block(tokens, other)),
            }
            for name, (browser, library) in close.items():
                np.testing.assert_allclose(browser, library, rtol=EXACT, atol=EXACT, err_msg=f"{name}, {n}, {uniform}")
            scores = torch.cat([tokens, query[None]]) @ query * (not uniform) / 2**0.5
            np.testing.assert_allclose(column("weight"), scores.softmax(0)[:-1], rtol=EXACT)
            assert max(seen["residuals"]["output"], seen["residuals"]["steps"]) < EXACT
            assert seen["residuals"]["other"] > 1e-3, "the control: the edit was not made for the other query"


def test_tokens_are_dragged_added_and_removed(head, visit):
    page = visit.page
    before = head.locator("table").inner_text()
    box = token(head, 1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 60, y + 40, steps=4)
    page.mouse.up()
    assert head.locator("table").inner_text() != before
    assert residual(head, "output") < EXACT
    head.get_by_role("button", name="Add a token").click()
    assert head.locator("tbody tr").count() == head.locator(".icl-token").count() == 4
    token(head, 0).focus()
    for key in ("ArrowUp", "Shift+ArrowLeft", "Delete"):
        before = head.locator("table").inner_text()
        page.keyboard.press(key)
        assert head.locator("table").inner_text() != before
        assert max(residual(head, "output"), residual(head, "steps")) < EXACT < 1e-3 < residual(head, "other")
    for left in (2, 1):
        head.get_by_role("button", name="Remove token").click()
        assert head.locator("tbody tr").count() == left
    expect(head.get_by_role("button", name="Remove token 1")).to_be_disabled()
    head.get_by_role("switch").check()
    assert head.locator("tbody td").nth(2).inner_text() == "0.50", "one token and the query share uniform attention"
    head.get_by_role("button", name="Start").click()
    assert head.locator("tbody tr").count() == 3
    expect(head.get_by_role("switch")).not_to_be_checked()


def test_the_edit_serves_the_other_query_only_where_they_meet(head, visit):
    """Move the other query to the place of the first by keyboard: there, and only there, the gap closes."""
    values = {name: head.locator(f".icl-handle.{name}") for name in ("icl-a", "icl-other")}

    def at(name):
        _, x, _, y = values[name].get_attribute("aria-valuetext").replace(",", "").replace("−", "-").split()
        return np.array([float(x), float(y)])

    values["icl-other"].focus()
    assert residual(head, "other") > 1
    for key, far in zip(
        ("ArrowRight", "ArrowUp"), np.round((at("icl-a") - at("icl-other")) * 10).astype(int), strict=True
    ):
        for _ in range(far):
            visit.page.keyboard.press(key)
    assert residual(head, "other") < EXACT


@pytest.mark.parametrize(
    "visit", [{}, {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}], indirect=True
)
def test_head_is_readable_and_fits(head, visit):
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth") <= page.evaluate("innerWidth")
    assert [faint for faint in head.evaluate(CONTRASTS) if faint[1] < 4.5] == []
    if page.evaluate("matchMedia('(pointer: coarse)').matches"):
        for button in head.get_by_role("button").all():
            assert button.bounding_box()["height"] >= 44
        assert token(head, 0).locator(".icl-touch").bounding_box()["height"] >= 44


def test_zero_query_has_no_edit(head):
    query = head.locator(".icl-handle.icl-a")
    query.focus()
    for key, times in (("ArrowLeft", 11), ("ArrowDown", 5)):
        for _ in range(times):
            query.press(key)
    assert "there is no such edit" in head.get_by_role("alert").inner_text()
    query.press("ArrowUp")
    assert residual(head, "output") < EXACT


def test_columns_of_the_layer_move_and_the_challenge_has_its_answer(playground, visit):
    column = playground.locator(".icl-column").first
    column.focus()
    column.press("ArrowRight")
    assert column.get_attribute("aria-valuetext") == "x 1.10, y −0.30"
    assert float(playground.locator("[data-residual]").get_attribute("data-residual")) < EXACT
    assert "no edit of W can close the gap" in playground.locator(".icl-note").inner_text()
    a, aC = (playground.locator(f".icl-handle.icl-{name}") for name in ("a", "aC"))
    a.focus()
    for key, times in (("ArrowLeft", 15), ("ArrowDown", 4)):
        for _ in range(times):
            a.press(key)
    assert "Found" in playground.get_by_role("alert").inner_text()
    aC.focus()
    for key, times in (("ArrowLeft", 9), ("ArrowDown", 14)):
        for _ in range(times):
            aC.press(key)
    assert "nothing to imitate" in playground.get_by_role("alert").inner_text()
