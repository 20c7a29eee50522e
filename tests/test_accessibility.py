"""No page has a violation that axe-core finds: light and dark, with all folds open, as wide as a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import settle, visiting
from playwright.sync_api import Browser
from test_pages import PHONE, THEMES, pages

# Screen readers skip the drawn formulas and the insides of pictures, as axe does, but their thousands of elements take
# most of its time: they are emptied, and keep their sizes. Screen readers read MathML. For axe it is no text, so its
# letters stand for it.
PREPARE = """() => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const button of document.querySelectorAll(".toggle-button.toggle-button-hidden")) button.click();
  for (const moving of document.getAnimations()) moving.finish();
  for (const said of document.querySelectorAll("mjx-assistive-mml")) said.textContent = said.textContent;
  for (const drawn of document.querySelectorAll("mjx-math, svg[role=img]")) {
    const { width, height } = drawn.getBoundingClientRect();
    Object.assign(drawn.style, { width: `${width}px`, height: `${height}px` });
    drawn.replaceChildren();
  }
}"""


@pytest.mark.parametrize("address", ["file"], indirect=True)
@pytest.mark.parametrize("theme", THEMES)
def test_axe_finds_no_violation(browser: Browser, address: str, site: Path, theme: str):
    # Only colours depend on the theme, and the pages of the library and of its sources have the same ones.
    left_out = ("_modules/icl_lib/",) if theme == "light" else ("_modules/", "book/api/")
    options = {"resultTypes": ["violations"], **({} if theme == "light" else {"runOnly": ["color-contrast"]})}
    found: dict[str, list[str]] = {}
    with visiting(browser, address, viewport=PHONE) as visit:
        page = visit.page
        for name in [page for page in pages(site) if not page.startswith(left_out)]:
            page.goto(f"{address}/{name}")
            settle(page)
            page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
            page.evaluate(PREPARE)
            for violation in Axe().run(page, options=options).response["violations"]:
                where = [node["target"][0] for node in violation["nodes"]]
                found.setdefault(violation["id"], []).append(f"{name}: {len(where)}, {where[:3]}")
    assert found == {}


@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_axe_finds_what_is_wrong(browser: Browser, address: str):
    """The control: a link without a name and a text that can hardly be seen are found in a page that has no others."""
    with visiting(browser, address) as visit:
        page = visit.page
        page.goto(f"{address}/book/index.html")
        settle(page)
        page.evaluate(
            """() => document.querySelector("article").insertAdjacentHTML(
              "afterbegin", '<a href="#"></a><p style="color: #bbb; background: white">faint</p>')"""
        )
        violations = Axe().run(page, options={"runOnly": ["color-contrast", "link-name"]}).response["violations"]
        assert {violation["id"] for violation in violations} == {"color-contrast", "link-name"}
