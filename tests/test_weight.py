"""What a page costs its reader: bytes, and time on a slow phone. The table is printed also if all is well."""

from __future__ import annotations

import gzip
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from browser import settle, visiting
from conftest import ROOT
from playwright.sync_api import Browser, Page
from tabulate import tabulate

LANDING, MODEL = "book/index", "hidden_rule.js"
PARTS = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))["parts"]
CHAPTERS = [chapter["file"] for part in PARTS if part["caption"] != "Reference" for chapter in part["chapters"]]
DECODED, GZIPPED, CHAPTER_DECODED = 1_200_000, 350_000, 2_500_000
SLOWDOWN = 4
PHONE = {"width": 390, "height": 844}
# Seconds of the main thread's own work, slowed down. Unlike the time on the clock, it depends little on what else runs.
WORK = {LANDING: 2.0, **dict.fromkeys(CHAPTERS, 4.0)}
LATE = """
window.busyUntil = 0;
new PerformanceObserver((list) => {
  for (const task of list.getEntries()) window.busyUntil = Math.max(window.busyUntil, task.startTime + task.duration);
}).observe({ type: "longtask", buffered: true });
"""
TIMES = """() => {
  const painted = performance.getEntriesByName("first-contentful-paint")[0].startTime;
  const { domInteractive } = performance.getEntriesByType("navigation")[0];
  return [painted, Math.max(painted, domInteractive, window.busyUntil)].map((time) => time / 1000);
}"""


def weight(site: Path, urls: set[str]) -> tuple[int, int]:
    """The bytes of these files of the site, as they are and gzipped; fonts and pictures are compressed already."""
    decoded = compressed = 0
    for path in {unquote(urlsplit(url).path) for url in urls}:
        content = (site / path.lstrip("/")).read_bytes()
        decoded += len(content)
        packed = path.endswith((".woff", ".woff2", ".png"))
        compressed += len(content) if packed else len(gzip.compress(content, 6))
    return decoded, compressed


@pytest.mark.parametrize("address", ["http"], indirect=True)
def test_pages_are_light(browser: Browser, address: str, site: Path, capsys: pytest.CaptureFixture[str]):
    rows, faults = [], []
    for name in (LANDING, *CHAPTERS):
        with visiting(browser, address, viewport=PHONE, is_mobile=True, has_touch=True) as visit:
            page, urls = visit.page, set()
            page.on("response", lambda response, urls=urls: urls.add(response.url))
            page.add_init_script(LATE)
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            page.goto(f"{address}/{name}.html")
            settle(page)
            page.wait_for_timeout(200)
            metrics = session.send("Performance.getMetrics")["metrics"]
            work = SLOWDOWN * next(each["value"] for each in metrics if each["name"] == "TaskDuration")
            session.send("Emulation.setCPUThrottlingRate", {"rate": SLOWDOWN})
            page.reload()
            settle(page)
            page.wait_for_timeout(1000)
            painted, interactive = page.evaluate(TIMES)
            models = {url for url in urls if MODEL in url}
            decoded, compressed = weight(site, urls - models)
            model, model_compressed = weight(site, models)
        kilobytes = [round(count / 1000) for count in (decoded, compressed, model, model_compressed)]
        rows.append([name, len(urls), *kilobytes, painted, interactive, work])
        if decoded > (DECODED if name == LANDING else CHAPTER_DECODED):
            faults.append(f"{name}: {decoded} bytes")
        if name == LANDING and compressed > GZIPPED:
            faults.append(f"{name}: {compressed} bytes gzipped")
        if work > 2 * WORK[name]:
            faults.append(f"{name}: {work:.1f} s of work, for a bound of {WORK[name]}")
    headers = ["page", "requests", "kB", "gzipped", "model", "gzipped", "painted", "interactive", "work"]
    with capsys.disabled():
        print(f"\n{tabulate(rows, headers, floatfmt='.2f')}\nSeconds: on a phone, {SLOWDOWN} times slower than here.")
    assert faults == []


# --- the search


def results(page: Page, query: str) -> list[dict[str, str]]:
    """What the search shows for a query that is typed."""
    field = page.locator("#pst-search-dialog input")
    field.fill(query)
    return page.locator("#search-as-you-type li").evaluate_all(
        """(items) => items.map((item) => ({
          href: item.querySelector("a").getAttribute("href"),
          title: item.querySelector("a").textContent,
          excerpt: item.querySelector("p").textContent,
        }))"""
    )


def test_the_search_finds_sections(browser: Browser, address: str, site: Path):
    with visiting(browser, address) as visit:
        page = visit.page
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/{LANDING}.html")
        settle(page)
        assert not [url for url in asked if "search" in url], "the index is loaded before a reader searches"
        page.keyboard.press("Control+k")
        page.wait_for_function("document.documentElement.dataset.search")
        assert results(page, "") == []
        assert results(page, "zzyzx") == []
        first = {query: results(page, query)[0] for query in ("LoRA", "rank one", "von Oswald", "weight_update")}
        assert "adapter" in first["LoRA"]["title"]
        assert "/api/" not in first["LoRA"]["href"]
        assert first["weight_update"]["title"].startswith("theorem.weight_update")
        assert "deriving.html#" in first["rank one"]["href"]
        assert "Oswald" in first["von Oswald"]["excerpt"]
        for query in ("ran", "theorem", "delta w", "ΔW", "layer norm"):
            found = results(page, query)
            assert found, query
            for result in found:
                assert not any(menu in result["excerpt"] for menu in ("\\\\", "Contents", ".pdf", "Click to show")), (
                    result
                )
                file, _, anchor = result["href"].removeprefix("../").partition("#")
                assert not anchor or f'id="{anchor}"' in (site / file).read_text(encoding="utf-8"), result
        results(page, "rank one")
        page.keyboard.press("ArrowDown")
        assert page.evaluate("document.activeElement.textContent") == first["rank one"]["title"]
        page.keyboard.press("Enter")
        page.wait_for_url("**/deriving.html#*")
        page.goto(f"{address}/search.html?q=von+Oswald")
        page.wait_for_function("document.documentElement.dataset.search")
        assert page.locator("#search-results li a").count() > 1
        assert visit.problems() == []


@pytest.mark.slow
def test_every_icon_of_the_pages_is_drawn(site: Path):
    drawn = set(re.findall(r"\.(fa-[\w-]+)", (site / "_static" / "icons.css").read_text(encoding="utf-8")))
    sizes = {"fa-solid", "fa-lg", "fa-brands", "fa-regular", "fa-fw"}
    for page in site.rglob("*.html"):
        named = re.findall(r'<i class="([^"]*\bfa-[^"]*)"', page.read_text(encoding="utf-8"))
        assert {icon for each in named for icon in each.split() if icon.startswith("fa-")} - sizes <= drawn, page
