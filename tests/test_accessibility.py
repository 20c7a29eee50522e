"""No page has a violation that axe-core finds: light and dark, with all folds open, as wide as a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import settle, visiting
from playwright.sync_api import Browser
from test_pages import PHONE, THEMES, pages

OPEN = """() => {
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  for (const button of document.querySelectorAll(".toggle-button.toggle-button-hidden")) button.click();
}"""
OPTIONS = {"resultTypes": ["violations"]}


@pytest.mark.parametrize("address", ["file"], indirect=True)
def test_axe_finds_no_violation(browser: Browser, address: str, site: Path):
    found: dict[str, list[str]] = {}
    with visiting(browser, address, viewport=PHONE) as visit:
        page = visit.page
        for name in [page for page in pages(site) if not page.startswith("_modules/icl_lib/")]:
            page.goto(f"{address}/{name}")
            settle(page)
            page.evaluate(OPEN)
            for theme in THEMES:
                page.evaluate("(theme) => { document.documentElement.dataset.theme = theme; }", theme)
                # Nothing but colours depends on the theme.
                only = {"runOnly": ["color-contrast"]} if theme != THEMES[0] else {}
                for violation in Axe().run(page, options={**OPTIONS, **only}).response["violations"]:
                    where = [node["target"][0] for node in violation["nodes"]]
                    found.setdefault(f"{violation['id']} ({theme})", []).append(f"{name}: {len(where)}, {where[:3]}")
    assert found == {}
