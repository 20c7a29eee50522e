"""Every page of the built book in a real browser, and everything on it that moves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CONTRASTS, Visit, settle, visiting
from playwright.sync_api import Browser, Locator, Page

EXACT = 1e-12
WIDGET = '<div class="icl-widget"'
PHONE = {"width": 390, "height": 844}


def pages(site: Path, containing: str = "") -> list[str]:
    """The pages of the book, as paths below its folder, whose HTML contains a string."""
    found = []
    for path in sorted(site.rglob("*.html")):
        text = path.read_text(encoding="utf-8")
        forwards = 'http-equiv="Refresh"' in text  # the site's root leads to the landing page
        if containing in text and not forwards and "_static" not in path.relative_to(site).parts:
            found.append(path.relative_to(site).as_posix())
    return found


def a_page(site: Path, widget: str) -> str:
    """A page with this widget: the landing page if it has one."""
    found = pages(site, f'{WIDGET} data-widget="{widget}"')
    assert found, f"no page of the book has the widget {widget}"
    return next((page for page in found if page == "book/index.html"), found[0])


@pytest.fixture
def visit(browser: Browser, address: str) -> Iterator[Visit]:
    with visiting(browser, address) as visit:
        yield visit
        assert visit.problems() == []


@pytest.fixture
def playground(visit: Visit, address: str, site: Path) -> Locator:
    """The playground of the landing page."""
    visit.page.goto(f"{address}/{a_page(site, 'playground')}")
    settle(visit.page)
    return visit.page.locator(".icl-playground").first


def residual(playground: Locator) -> float:
    """The number that the playground prints, read as a reader would."""
    text = playground.locator(".icl-residual output").inner_text().replace("−", "-")
    mantissa, _, exponent = text.replace("\n", "").partition("× 10")
    return float(mantissa) * 10.0 ** int(exponent or 0)


def state(playground: Locator) -> tuple[str, ...]:
    """What the two handles and the three lines of numbers say."""
    handles = [handle.get_attribute("aria-valuetext") for handle in playground.locator(".icl-handle").all()]
    return (*handles, *playground.locator(".icl-facts").all_inner_texts())


def middle(locator: Locator) -> tuple[float, float]:
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_every_page_is_complete_and_quiet(browser: Browser, address: str, site: Path):
    """No request to another host, nothing in the console, mathematics typeset, nothing wider than a phone."""
    found = {}
    with visiting(browser, address) as visit:
        page = visit.page
        for name in pages(site):
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto(f"{address}/{name}")
            page.wait_for_load_state("load")
            settle(page)
            problems = visit.problems()
            if wrong := page.locator("mjx-merror, [data-mjx-error]").count():
                problems.append(f"{wrong} formulas that MathJax cannot read")
            if left := page.locator(".math:not(:has(mjx-container))").count():
                problems.append(f"{left} formulas that are not typeset")
            page.set_viewport_size(PHONE)
            for theme in ("light", "dark"):
                page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
                if (width := page.evaluate("document.documentElement.scrollWidth")) > PHONE["width"]:
                    problems.append(f"{width} pixels wide on a phone of {PHONE['width']} in {theme} mode")
            if problems := problems + visit.problems():
                found[name] = problems
    assert found == {}


def test_the_root_leads_to_the_landing_page(visit: Visit, address: str):
    visit.page.goto(f"{address}/index.html")
    visit.page.wait_for_url("**/book/index.html")
    settle(visit.page)


def test_playground_follows_the_mouse(playground: Locator, visit: Visit):
    assert residual(playground) < EXACT
    for handle in playground.locator(".icl-handle").all():
        before, (x, y) = state(playground), middle(handle)
        visit.page.mouse.move(x, y)
        visit.page.mouse.down()
        visit.page.mouse.move(x + 31, y - 23, steps=5)
        visit.page.mouse.up()
        after = state(playground)
        assert after != before
        assert middle(handle) == pytest.approx((x + 31, y - 23), abs=1.5)
        assert residual(playground) < EXACT
        visit.page.mouse.move(x - 50, y + 50)
        assert state(playground) == after, "the handle was not let go"


def test_playground_follows_the_keyboard(playground: Locator, visit: Visit):
    for handle in playground.locator(".icl-handle").all():
        handle.focus()
        seen = [state(playground)]
        for key in ("ArrowUp", "Shift+ArrowUp", "ArrowRight", "Shift+ArrowLeft"):
            visit.page.keyboard.press(key)
            assert state(playground) not in seen
            assert residual(playground) < EXACT
            seen.append(state(playground))
    assert len(re.findall(r"-?\d+\.\d\d", playground.locator(".icl-edit").inner_text().replace("−", "-"))) == 8


def test_playground_follows_a_finger(browser: Browser, address: str, site: Path):
    with visiting(browser, address, viewport=PHONE, has_touch=True, is_mobile=True) as visit:
        page = visit.page
        page.goto(f"{address}/{a_page(site, 'playground')}")
        settle(page)
        playground = page.locator(".icl-playground").first
        touch = page.context.new_cdp_session(page)
        for handle in playground.locator(".icl-handle").all():
            x, y = middle(handle)
            scrolled = page.evaluate("scrollY")
            touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
            for i in range(1, 6):
                point = {"x": x - 6 * i, "y": y - 5 * i}
                touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [point]})
            touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
            assert page.evaluate("scrollY") == scrolled, "the page scrolled away under the finger"
            assert middle(handle) == pytest.approx((x - 30, y - 25), abs=1.5)
            assert residual(playground) < EXACT
        # Anywhere else on the playground the page must scroll as usual.
        taken = playground.evaluate(
            "(el) => [...el.querySelectorAll('*')].filter((n) => getComputedStyle(n).touchAction !== 'auto'"
            " && !n.closest('.icl-handle')).length"
        )
        assert taken == 0
        left, right = (plane.bounding_box() for plane in playground.locator(".icl-plane").all())
        assert right["y"] >= left["y"] + left["height"], "the planes are not one above the other on a phone"
        assert visit.problems() == []


def test_playground_shows_what_breaks_without_the_edit(playground: Locator):
    """The negative control: without ΔW the outputs differ, by a lot."""
    switch = playground.get_by_role("switch")
    switch.uncheck()
    assert residual(playground) > 0.1
    switch.check()
    assert residual(playground) < EXACT


def test_playground_says_that_the_theorem_needs_a_nonzero_vector(playground: Locator, visit: Visit):
    to = middle(playground.locator(".icl-plane svg").first)
    x, y = middle(playground.locator(".icl-handle").first)
    visit.page.mouse.move(x, y)
    visit.page.mouse.down()
    visit.page.mouse.move(to[0] + 2, to[1] - 3, steps=5)
    visit.page.mouse.up()
    assert "needs a0 ≠ 0" in playground.get_by_role("alert").inner_text().replace("\n", "")
    assert playground.locator(".icl-residual output").inner_text() == "not defined"
    visit.page.keyboard.press("Shift+ArrowRight")
    assert playground.get_by_role("alert").count() == 0
    assert residual(playground) < EXACT


def test_playground_presets(playground: Locator):
    start = state(playground)
    for button in playground.locator(".icl-presets button").all()[1:]:
        button.click()
        assert state(playground) != start
        assert residual(playground) < EXACT
    playground.get_by_role("button", name="Start").click()
    assert state(playground) == start


def _drive(page: Page, explore: Locator) -> None:
    """Move every control by keyboard: each must change the picture, and back again must give it back."""
    frame = explore.locator(".icl-frame")
    keys = {"range": ("ArrowRight", "ArrowLeft"), "checkbox": ("Space", "Space"), "radio": ("ArrowRight", "ArrowLeft")}
    for control in explore.locator(".icl-controls :is(select, input:not([type=radio]), input:checked)").all():
        there, back = keys.get(control.get_attribute("type"), ("ArrowDown", "ArrowUp"))
        before = frame.get_attribute("data-frame")
        control.focus()
        page.keyboard.press(there)
        assert frame.get_attribute("data-frame") != before, f"{explore.inner_text()}: a control does nothing"
        page.keyboard.press(back)
        assert frame.get_attribute("data-frame") == before
    assert frame.inner_text().strip() or frame.locator("svg, img").count()


def test_explore_changes_its_frame_by_keyboard(visit: Visit, address: str, site: Path):
    found = pages(site, f'{WIDGET} data-widget="explore"')
    assert found, "no page of the book has an explore"
    for name in found:
        visit.page.goto(f"{address}/{name}")
        settle(visit.page)
        for explore in visit.page.locator("[data-widget=explore]").all():
            _drive(visit.page, explore)


def test_explore_follows_the_mouse(visit: Visit, address: str, site: Path):
    visit.page.goto(f"{address}/{a_page(site, 'explore')}")
    settle(visit.page)
    explore = visit.page.locator("[data-widget=explore]:has(input[type=range])").first
    before = explore.locator(".icl-frame").get_attribute("data-frame")
    x, y = middle(explore.locator("input[type=range]").first)
    visit.page.mouse.click(x, y)
    assert explore.locator(".icl-frame").get_attribute("data-frame") != before


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_widgets_are_readable(visit: Visit, address: str, site: Path, theme: str):
    visit.page.emulate_media(color_scheme=theme)
    for name in pages(site, WIDGET):
        visit.page.goto(f"{address}/{name}")
        settle(visit.page)
        for widget in visit.page.locator("[data-widget]").all():
            faint = [(text, round(ratio, 2)) for text, ratio in widget.evaluate(CONTRASTS) if ratio < 3]
            assert faint == [], f"{name} in {theme} mode"


def test_without_javascript_a_drawn_picture_stays(browser: Browser, address: str, site: Path):
    with visiting(browser, address, java_script_enabled=False) as visit:
        visit.page.goto(f"{address}/{a_page(site, 'playground')}")
        assert visit.page.locator("[data-widget=playground] svg[role=img]").is_visible()


def test_pages_load_the_widgets_only_where_they_are_used(site: Path):
    for name in pages(site):
        text = (site / name).read_text(encoding="utf-8")
        assert ("_static/widgets.js" in text) == ("_static/widgets.css" in text) == (WIDGET in text), name
        assert text.count("const THEBE_JS_URL") <= 1, name
