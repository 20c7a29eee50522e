"""A real browser for the tests: Chromium, with all other hosts blocked and all complaints of a page recorded."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Response, Route, sync_playwright

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
HOW_TO_GET_ONE = (
    "No Chromium found; the book is tested in a real one. Install it (Debian: apt-get install chromium; anywhere: "
    "python -m playwright install chromium), or set CHROMIUM to the path of one."
)


def find_chromium(playwright: Playwright) -> str | None:
    """The path of a Chromium: ``$CHROMIUM``, one on the PATH, or Playwright's own."""
    if "CHROMIUM" in os.environ:
        return os.environ["CHROMIUM"]
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A Chromium for a script; ends the script, and says how to get one, where there is none."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            sys.exit(HOW_TO_GET_ONE)
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@dataclass
class Visit:
    """A page, and its problems so far."""

    page: Page
    outside: list[str] = field(default_factory=list)  # requests to other hosts, all refused
    complaints: list[str] = field(default_factory=list)  # console errors and warnings, uncaught errors, HTTP >= 400

    def problems(self) -> list[str]:
        """The problems since the last call."""
        found = [*(f"request to {url}" for url in self.outside), *self.complaints]
        self.outside.clear()
        self.complaints.clear()
        return found


@contextlib.contextmanager
def visiting(browser: Browser, address: str, **options: object) -> Iterator[Visit]:
    """A page in a new profile that can load from ``address`` (``http://`` or ``file://``) only."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    visit = Visit(context.new_page())

    def route(route: Route) -> None:
        url = route.request.url
        if url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            visit.outside.append(url)
            route.abort()

    context.route("**/*", route)

    def console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            visit.complaints.append(f"{message.type}: {message.text}")

    def response(response: Response) -> None:
        if response.status >= 400:
            visit.complaints.append(f"{response.status} {response.url}")

    visit.page.on("pageerror", lambda error: visit.complaints.append(f"uncaught: {error}"))
    visit.page.on("console", console)
    visit.page.on("response", response)
    try:
        yield visit
    finally:
        context.close()


def settle(page: Page) -> None:
    """Wait until the fonts are loaded and the widgets started."""
    page.evaluate(
        """async () => {
          const until = async (ready) => { while (!ready()) await new Promise((done) => setTimeout(done, 20)); };
          await until(() => !document.querySelector(".icl-widget:not([data-ready])"));
          await document.fonts.ready;
        }"""
    )


CONTRASTS = """(root) => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].map((x) => x / 255);
  };
  const over = (top, below) => top.slice(0, 3).map((x, i) => x * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = (node) => {
    const layers = [];
    for (let n = node; n; n = n.parentElement) layers.push(rgba(getComputedStyle(n).backgroundColor));
    return layers.reverse().reduce((below, top) => over(top, below), [1, 1, 1, 1]);
  };
  const luminance = (c) => {
    const [r, g, b] = c.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const result = [];
  for (const node of root.querySelectorAll("*")) {
    const text = [...node.childNodes].filter((n) => n.nodeType === 3).map((n) => n.data.trim()).join("");
    if (!text || ["STYLE", "SCRIPT", "OPTION"].includes(node.tagName) || node.closest("svg[role=img]")) continue;
    const style = getComputedStyle(node);
    if (style.visibility === "hidden" || !node.getClientRects().length) continue;
    const ground = behind(node instanceof SVGElement ? node.ownerSVGElement : node);
    const ink = over(rgba(node instanceof SVGElement ? style.fill : style.color), ground);
    const [high, low] = [luminance(ink), luminance(ground)].sort((a, b) => b - a);
    result.push([text, (high + 0.05) / (low + 0.05)]);
  }
  return result;
}"""
"""For each piece of text in an element, except in pictures: the text, and its contrast with the background."""
