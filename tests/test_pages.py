"""Every page of the built book in a real browser, and everything interactive on it."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from pathlib import Path

import page_assets
import pytest
from browser import CONTRASTS, Visit, settle, visiting
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

import icl_lib

EXACT = 1e-12
WIDGET = '<div class="icl-widget"'
PHONE = {"width": 390, "height": 844}
THEMES = ("light", "dark")
# What a loaded page looks like and how it answers does not depend on the address that it was loaded from.
on_disk = pytest.mark.parametrize("address", ["file"], indirect=True)


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
    """The residual that the playground prints."""
    text = playground.locator(".icl-residual output").inner_text().replace("−", "-")
    mantissa, _, exponent = text.replace("\n", "").partition("× 10")
    return float(mantissa) * 10.0 ** int(exponent or 0)


def state(playground: Locator) -> tuple[str, ...]:
    """The positions of the two handles, and the three lines of numbers."""
    handles = [handle.get_attribute("aria-valuetext") for handle in playground.locator(".icl-handle").all()]
    return (*handles, *playground.locator(".icl-facts").all_inner_texts())


def middle(locator: Locator) -> tuple[float, float]:
    locator.scroll_into_view_if_needed()
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def test_every_page_is_complete_and_quiet(browser: Browser, address: str, site: Path):
    """No request to another host, nothing in the console, formulas typeset and no tab stops, all as wide as a phone."""
    found = {}
    # One template makes all pages of source code, and the index of these pages stands for them on the server.
    names = [name for name in pages(site) if address == site.as_uri() or not name.startswith("_modules/icl_lib/")]
    with visiting(browser, address) as visit:
        page = visit.page
        for name in names:
            page.set_viewport_size({"width": 1280, "height": 900})
            page.goto(f"{address}/{name}")
            page.wait_for_load_state("load")
            settle(page)
            problems = visit.problems()
            if left := page.locator(".math:not(:has(mjx-container))").count():
                problems.append(f"{left} formulas that are not typeset")
            all_seen = "(n) => n.filter((node) => node.scrollWidth <= node.clientWidth).length"
            if stops := page.locator("mjx-container:is([tabindex], :has([tabindex]))").evaluate_all(all_seen):
                problems.append(f"{stops} formulas that the Tab key stops at")
            if page.locator("mjx-container").count() != page.locator("mjx-container > mjx-assistive-mml").count():
                problems.append("formulas that a screen reader cannot read")
            page.set_viewport_size(PHONE)
            unreachable = "(n) => n.filter((node) => node.scrollWidth > node.clientWidth && node.tabIndex < 0).length"
            if stuck := page.locator(".icl-report").evaluate_all(unreachable):
                problems.append(f"{stuck} reports that the keyboard cannot scroll on a phone")
            for theme in THEMES:
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
    """The negative control: without ΔW the outputs differ by much more than rounding."""
    switch, gap = playground.get_by_role("switch"), playground.locator(".icl-gap")
    expect(gap).to_be_hidden()
    switch.uncheck()
    assert residual(playground) > 0.1
    expect(gap).to_be_visible()
    playground.page.emulate_media(reduced_motion="reduce")
    switch.check()
    assert gap.is_hidden(), "the gap closes at once if motion is to be reduced"
    assert residual(playground) < EXACT
    playground.page.emulate_media(reduced_motion="no-preference")
    switch.uncheck()
    switch.check()
    assert residual(playground) < EXACT, "the numbers do not wait for the picture"
    expect(gap).to_be_hidden()


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


@pytest.mark.parametrize("viewport", [{"width": 1280, "height": 900}, PHONE], ids=["desktop", "phone"])
def test_the_landing_page_begins_with_the_model(browser: Browser, address: str, viewport: dict[str, int]):
    """On the first screen the examples move into the weights, and the answers are there: the claim, before any text."""
    with visiting(browser, address, viewport=viewport) as visit:
        visit.page.goto(f"{address}/book/index.html")
        settle(visit.page)
        puzzle = visit.page.locator(".icl-puzzle")
        puzzle.get_by_role("switch").check()
        answers = puzzle.locator(".icl-answers b")
        assert [answers.nth(3 * column).inner_text() for column in range(3)] == ["20", "7", "20"]
        assert visit.page.evaluate("scrollY") == 0
        for part in (puzzle.locator(".icl-prompt"), puzzle.locator(".icl-switch"), puzzle.locator(".icl-answers")):
            box = part.bounding_box()
            assert box["y"] + box["height"] <= viewport["height"]
        assert visit.problems() == []


def _drive(page: Page, explore: Locator) -> None:
    """Move every control by keyboard: each must change the picture, and the opposite key restores it."""
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


def test_widgets_are_light(site: Path, capsys: pytest.CaptureFixture[str]):
    """What each widget adds to its page, as a table."""
    sizes = [
        (len(found[0].encode()) / 1000, name, found[1])
        for name in pages(site, WIDGET)
        for found in re.finditer(
            r'<div class="icl-widget" data-widget="(\w+)"><script type="application/json">.*?</script>',
            (site / name).read_text(encoding="utf-8"),
            re.DOTALL,
        )
    ]
    with capsys.disabled():
        print("".join(f"\n{size:6.1f} kB  {kind:10}  {name}" for size, name, kind in sorted(sizes, reverse=True)))
    assert sizes
    assert max(sizes)[0] <= 150


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
    slider, frame = explore.locator("input[type=range]").first, explore.locator(".icl-frame")
    x, y = middle(slider)
    length, seen = slider.bounding_box()["width"], set()
    for place in (-0.4, 0, 0.4):  # of the slider's length from its middle
        visit.page.mouse.click(x + place * length, y)
        seen.add(frame.get_attribute("data-frame"))
    assert len(seen) == 3


@on_disk
def test_widgets_are_readable(visit: Visit, address: str, site: Path):
    for name in pages(site, WIDGET):
        visit.page.goto(f"{address}/{name}")
        settle(visit.page)
        for theme in THEMES:
            visit.page.emulate_media(color_scheme=theme)
            expect(visit.page.locator("html")).to_have_attribute("data-theme", theme)
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
        assert "hidden_rule.js" not in text.partition("<body")[0], (
            f"{name}: the model is loaded when its widget is near"
        )
        for unused in (*page_assets.UNUSED, page_assets.THEME, "tex-chtml", "THEBE_JS_URL"):
            assert unused not in text.partition("<body")[0], name


# --- what the pages say without a browser


def prose(page: str) -> str:
    """The text of a page's article without code, signatures, formulas, drawings and widgets."""
    article = re.search(r"<article\b.*?</article>", page, re.DOTALL)[0]
    for tag in ("script", "style", "svg", "pre", "code", "dt"):
        article = re.sub(rf"<{tag}\b.*?</{tag}>", " ", article, flags=re.DOTALL)
    article = re.sub(r'<(span|div) class="math\b.*?</\1>', " ", article, flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", "", article))


def stray_asterisks(text: str) -> list[str]:
    """Asterisks at a word, which are left where emphasis is not closed; ``a * b`` is a product."""
    return re.findall(r".{0,30}(?:\*\*|(?<!\S)\*\S|\S\*(?!\S)|\w\*\W|\W\*\w).{0,30}", text)


def test_no_emphasis_is_left_as_asterisks(site: Path):
    page = "<article><p>%s</p><code>*args</code><p>2 * 3</p></article>"
    for broken in ("(its stream*), is", "can be *edited", "a **bold</p><p>word**", "the <em>end</em>* of it"):
        assert stray_asterisks(prose(page % broken)), "the control: broken emphasis is not found"
    assert stray_asterisks(prose(page % "whole <em>words</em>")) == []
    found = {
        name: stray_asterisks(prose((site / name).read_text(encoding="utf-8"))) for name in pages(site, "<article")
    }
    assert {name: asterisks for name, asterisks in found.items() if asterisks} == {}


def test_pictures_style_nothing_else_on_the_page(site: Path):
    for name in pages(site, "<svg"):
        body = (site / name).read_text(encoding="utf-8").partition("<body")[2]
        assert "<style" not in body, name


def test_folds_have_names_of_their_own(site: Path):
    found = pages(site, "<summary")
    assert found
    for name in found:
        summaries = re.findall(
            r"<summary\b([^>]*)>(.*?)</summary>", (site / name).read_text(encoding="utf-8"), re.DOTALL
        )
        folds = [
            html.unescape(re.sub(r"<[^>]+>", "", text)).split("\n")[1] for _, text in summaries if "fa-" not in text
        ]
        assert not [given for given, text in summaries if "aria-label" in given and "fa-" not in text], name
        assert [fold for fold in folds if folds.count(fold) > 1] == [], f"{name}: give each fold its own title"


def meta(page: str, name: str) -> list[str]:
    """The contents of the meta elements with a name or a property."""
    tags = re.findall(rf'<meta\b[^>]*\b(?:name|property)="{re.escape(name)}"[^>]*>', page)
    return [html.unescape(re.search(r'content="([^"]*)"', tag)[1]) for tag in tags]


def test_links_to_a_page_have_a_preview(site: Path):
    for name in pages(site, 'property="og:title"'):
        page = (site / name).read_text(encoding="utf-8")
        assert meta(page, "og:site_name") == ["In-context learning as weight updates"], name
        assert len(meta(page, "viewport")) == 1, name
        (description,) = meta(page, "description")
        assert [description] == meta(page, "og:description"), name
        assert re.search(r"[.!?][”)]?$", description), f"{name}: the description ends in the middle of a sentence"
        assert "..." not in description, name
        addresses = [*meta(page, "og:url"), *meta(page, "og:image")]
        assert all(address.startswith(("https://", "http://")) for address in addresses), name


def test_each_symbol_leads_to_where_its_chapter_has_it(site: Path):
    page = (site / "book" / "notation.html").read_text(encoding="utf-8")
    symbols = re.findall(
        r'(?:<a [^>]*href="([\w-]+\.html)#([^"]+)"[^>]*>)?<span class="math',
        "".join(re.findall(r'<tr class="row-(?:odd|even)"><td>(.*?)</td>', page, re.DOTALL)),
    )
    assert sum(bool(name) for name, _ in symbols) > 0.9 * len(symbols) > 100
    for name, anchor in {symbol for symbol in symbols if symbol[0]}:
        assert f'id="{anchor}"' in (site / "book" / name).read_text(encoding="utf-8"), (name, anchor)


def test_every_page_says_how_to_cite_it_and_every_chapter_what_to_read_first(site: Path):
    version = f"version {icl_lib.__version__}"
    entries, times = [], 0
    for name in pages(site, "<article"):
        page = (site / name).read_text(encoding="utf-8")
        if not name.startswith("book/"):
            continue
        entries += re.findall(r'<details class="cite">.*?<pre>(@\w+{[\w-]+,)', page, re.DOTALL)
        byline = re.findall(r'<p class="byline">(.*?)</p>', page)
        assert len(byline) == (name != "book/index.html"), name
        assert all(version in line for line in byline), name
        times += len(byline) and bool(re.match(r"\d+ minutes? · read .* first", byline[0]))
    assert len(set(entries)) == len(entries) == len([name for name in pages(site) if name.startswith("book/")])
    assert times >= 10


def test_citations_match_the_bibliography(site: Path):
    page = (site / "book" / "bibliography.html").read_text(encoding="utf-8")
    entries = re.findall(r'<div class="citation" id="([^"]+)".*?>\n(.*?)\n</div>', page, re.DOTALL)
    assert len(entries) > 5
    labels = {}
    for anchor, entry in entries:
        label = re.search(r'<span class="label">(.*?)</span>\n', entry)[1]
        labels[anchor] = html.unescape(re.sub(r"<[^>]+>", "", label)).strip("[]")
        addresses = re.findall(r'href="(https?://[^"]+)"', entry)
        assert len(addresses) == len(set(addresses)), f"{labels[anchor]}: an address is printed twice"
        back = re.findall(r'href="([\w-]+\.html)#([\w-]+)"', entry)
        assert back, f"{labels[anchor]}: no link leads back"
        for name, target in back:
            assert f'id="{target}"' in (site / "book" / name).read_text(encoding="utf-8")
    in_order = [label.lower() for label in labels.values()]
    assert in_order == sorted(in_order)
    cited = 0
    for name in pages(site, "bibtex-citation"):
        text = (site / name).read_text(encoding="utf-8")
        for citation in re.findall(r'<span class="bibtex-citation"[^>]*>(.*?)</span>', text, re.DOTALL):
            for anchor, shown in re.findall(r'href="bibliography\.html#([\w-]+)"[^>]*>(.*?)</a>', citation):
                shown = html.unescape(re.sub(r"<[^>]+>", "", shown))
                author, year = labels[anchor].rsplit(", ", 1)
                before = html.unescape(re.sub(r"<[^>]+>", "", citation.partition(f"#{anchor}")[0].rpartition("<a")[0]))
                assert shown == labels[anchor] or (shown == year and before.endswith(f"{author} [")), f"{name}: {shown}"
                cited += 1
    assert cited >= len(labels)


# --- keyboard, screen readers, print and system colours


@on_disk
def test_formulas_are_no_stops_of_the_tab_key(visit: Visit, address: str, site: Path):
    """By keyboard, a reader comes to the first explorer without a stop at each formula before it."""
    name = next(
        name for name in pages(site, f'{WIDGET} data-widget="explore"') if 'class="math' in (site / name).read_text()
    )
    visit.page.goto(f"{address}/{name}")
    settle(visit.page)
    stops = []
    inside = "['.icl-explore', 'mjx-container', '*'].find((what) => document.activeElement.closest(what))"
    while ".icl-explore" not in stops:
        visit.page.keyboard.press("Tab")
        stops.append(visit.page.evaluate(inside))
        assert len(stops) < 150, "the Tab key does not reach the explorer"
    assert "mjx-container" not in stops


@on_disk
def test_formulas_are_copied_in_tex(visit: Visit, address: str, site: Path):
    """A double click copies one formula; text is copied with its formulas, and text without any as it is."""
    visit.page.goto(f"{address}/book/theorem.html")
    settle(visit.page)
    visit.page.evaluate(
        "addEventListener('copy', (event) => (window.copied = event.clipboardData.getData('text/plain')))"
    )
    visit.page.locator("mjx-container[display=true]").first.dblclick()
    copied = visit.page.evaluate("window.copied")
    assert copied.startswith("$$")
    assert r"\lVert \boldsymbol a_0 \rVert^2" in copied
    expect(visit.page.locator(".symbols-shown[role=status]")).to_have_text(f"Copied: {copied.strip('$')}")
    select = "(node) => getSelection().selectAllChildren(node)"
    visit.page.locator("p:has(.math)").first.evaluate(select)
    visit.page.keyboard.press("ControlOrMeta+c")
    assert re.search(r"\w \$[^$]+\$[ ,.]", visit.page.evaluate("window.copied"))
    visit.page.locator("article h1").evaluate(select)
    visit.page.keyboard.press("ControlOrMeta+c")
    assert visit.page.evaluate("window.copied") == "", "the browser copies plain text by itself"


@on_disk
def test_explore_is_announced(visit: Visit, address: str, site: Path):
    """A screen reader reads the alternative text of each new frame."""
    visit.page.goto(f"{address}/{a_page(site, 'explore')}")
    settle(visit.page)
    explore = visit.page.locator("[data-widget=explore]:has(.icl-frame svg[role=img]):has(input[type=range])").first
    live = explore.locator("[aria-live=polite]")
    assert live.text_content() == "", "the first frame is read with the page"
    for key in ("ArrowRight", "ArrowLeft"):
        explore.locator("input[type=range]").first.press(key)
        visit.page.wait_for_timeout(600)
        pictures = explore.locator(".icl-frame svg[role=img]").all()
        assert live.text_content() == " ".join(picture.get_attribute("aria-label") for picture in pictures)
    assert live.bounding_box()["width"] <= 1


@on_disk
def test_folded_solutions_have_names_of_their_own(visit: Visit, address: str, site: Path):
    found = pages(site, "dropdown admonition")
    assert found
    for name in found:
        visit.page.goto(f"{address}/{name}")
        settle(visit.page)
        names = visit.page.locator(".toggle-button").evaluate_all("(nodes) => nodes.map((node) => node.ariaLabel)")
        assert len(names) == len(set(names)) > 0, name
        assert all("Solution" in name for name in names)


SEPARATED = """() => [...document.querySelectorAll("article span.math")].filter((formula) => {
  const next = formula.nextSibling;
  if (!(next instanceof Text) || !/^[,.;:)]/.test(next.data)) return false;
  const mark = document.createRange();
  mark.setStart(next, 0);
  mark.setEnd(next, 1);
  const { left, width } = mark.getBoundingClientRect();
  return width > 0 && left < formula.getBoundingClientRect().left;
}).length"""


@on_disk
def test_no_line_begins_with_the_punctuation_of_a_formula(browser: Browser, address: str, site: Path):
    bad = apart = 0
    with visiting(browser, address, viewport=PHONE) as visit:
        for name in pages(site, "math notranslate"):
            visit.page.goto(f"{address}/{name}")
            settle(visit.page)
            bad += visit.page.evaluate(SEPARATED)
            visit.page.add_style_tag(content=".unbroken { white-space: normal !important; }")
            apart += visit.page.evaluate(SEPARATED)
        assert visit.problems() == []
    assert bad == 0
    assert apart > 0, "the control: no formula of the book is at the end of a line"


WIDE = """() => [...document.querySelectorAll("article :is(.pst-scrollable-table-container, div.math mjx-container)")]
  .filter((node) => node.checkVisibility() && node.scrollWidth > node.clientWidth + 60)"""


@on_disk
@pytest.mark.parametrize("theme", THEMES)
def test_what_is_too_wide_for_a_phone_has_a_shadow_where_it_goes_on(
    browser: Browser, address: str, site: Path, theme: str
):
    with visiting(browser, address, viewport=PHONE) as visit:
        visit.page.goto(f"{address}/book/theorem.html")
        settle(visit.page)
        visit.page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
        wide = [each.as_element() for each in visit.page.evaluate_handle(WIDE).get_properties().values()]
        assert wide
        for node in wide:
            for scrolled, shadow in ((0, (False, True)), (100_000, (True, False))):
                node.evaluate("(node, x) => { node.scrollLeft = x; node.style.color = 'transparent'; }", scrolled)
                with Image.open(io.BytesIO(node.screenshot())) as picture:
                    row = picture.convert("L").crop((3, picture.height - 6, picture.width - 3, picture.height - 5))
                    ends, middle = (row.getpixel((0, 0)), row.getpixel((row.width - 1, 0))), row.getpixel((40, 0))
                assert tuple(abs(end - middle) > 20 for end in ends) == shadow


@on_disk
@pytest.mark.parametrize("width", [PHONE["width"], 1280])
def test_the_tables_of_notation_fit_their_column(browser: Browser, address: str, width: int):
    with visiting(browser, address, viewport={"width": width, "height": 900}) as visit:
        visit.page.goto(f"{address}/book/notation.html")
        settle(visit.page)
        wider = "(all) => all.filter((table) => table.offsetWidth > table.parentElement.clientWidth + 1).length"
        tables = visit.page.locator("table.notation")
        assert tables.count() > 5
        assert tables.evaluate_all(wider) == 0


INKS = """() => {
  const shown = {};
  for (const what of ["h1", "article p", "pre", ".icl-explore svg[role=img]", ".icl-explore output"]) {
    const node = document.querySelector(what);
    if (node) shown[what] = getComputedStyle(node).color;
  }
  return { shown, theme: document.documentElement.dataset.theme };
}"""


@on_disk
def test_a_page_is_printed_in_the_light_theme(visit: Visit, address: str, site: Path):
    page = visit.page
    page.emulate_media(color_scheme="dark")
    page.goto(f"{address}/{a_page(site, 'explore')}")
    settle(page)
    before = page.evaluate(INKS)
    page.evaluate(
        f"matchMedia('print').addEventListener('change', (event) => event.matches && (window.printed = ({INKS})()))"
    )
    page.pdf()
    printed = page.evaluate("window.printed")
    assert len(printed["shown"]) >= 4

    def brightness(colour: str) -> float:
        return max(map(float, re.findall(r"[\d.]+", colour)[:3]))

    assert min(map(brightness, before["shown"].values())) > 150, "the control: this page is not dark on the screen"
    assert max(map(brightness, printed["shown"].values())) < 100
    assert page.evaluate(INKS) == before, "after printing, the reader's own theme is not back"


def colour(locator: Locator) -> tuple[int, ...]:
    """The most frequent colour in a picture of an element, without its edge."""
    with Image.open(io.BytesIO(locator.screenshot())) as picture:
        size = (2, 2, picture.width - 2, picture.height - 2)
        return max(picture.convert("RGB").crop(size).getcolors(maxcolors=1 << 20))[1]


@on_disk
def test_widgets_keep_their_meaning_in_forced_colours(browser: Browser, address: str, site: Path):
    """Where the system sets all colours, the switch, the heat of the matrix and a choice can still be seen."""
    with visiting(browser, address, forced_colors="active") as visit:
        page = visit.page
        page.goto(f"{address}/{a_page(site, 'playground')}")
        settle(page)
        playground = page.locator(".icl-playground").first
        switch = playground.get_by_role("switch")
        for theme in THEMES:
            page.emulate_media(color_scheme=theme, forced_colors="active")
            switch.check()
            page.mouse.move(0, 0)
            on = switch.screenshot()
            cells = playground.locator(".icl-plus, .icl-minus")
            seen = {cell.get_attribute("style"): colour(cell) for cell in cells.all()}
            assert len(set(seen.values())) == len(seen) > 1
            assert [faint for faint in playground.evaluate(CONTRASTS) if faint[1] < 3] == []
            switch.uncheck()
            page.mouse.move(0, 0)
            assert switch.screenshot() != on
        for name in pages(site, f'{WIDGET} data-widget="explore"'):
            page.goto(f"{address}/{name}")
            settle(page)
            for theme in THEMES:
                page.emulate_media(color_scheme=theme, forced_colors="active")
                for choice in page.locator(".icl-choice").all():
                    chosen, *_ = choice.locator("input:checked + span").all()
                    assert colour(chosen) != colour(choice.locator("input:not(:checked) + span").first)
