"""The widgets in a real JupyterLab with a kernel: a chapter as it runs for a reader who opens it there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import nbformat
import notebooks
import pytest
from browser import visiting
from conftest import ROOT
from nbformat.v4 import new_code_cell
from playwright.sync_api import Browser, expect

TOKEN = "only-on-loopback"
START = 60  # seconds allowed for the server to start, and again for the kernel, on a busy machine
CELLS = [
    """\
import ipywidgets
from icl_lib.paper.figures import Figure, figure
from icl_lib.widgets import AttentionHead, Playground, Puzzle, explore""",
    "playground = Playground()\nplayground",
    """\
seen = ipywidgets.Label("nothing yet").add_class("python-sees")
def tell(_):
    seen.value = f"python has a={playground.a} applied={playground.applied}"
playground.observe(tell, ["a", "applied"])
seen""",
    """\
def draw(power, dashed):
    with figure(height=2) as (fig, ax):
        ax.plot([x**power for x in range(9)], linestyle="--" if dashed else "-")
    return Figure(fig, f"x to the power of {power}, dashed: {dashed}")
explore(draw, power=range(1, 6), dashed=[False, True])""",
    "puzzle = Puzzle()\npuzzle",
    """\
moved = ipywidgets.Label("in the prompt").add_class("python-moved")
puzzle.observe(lambda _: setattr(moved, "value", f"served: {puzzle.serves}"), "serves")
moved""",
    """\
head = AttentionHead()
counted = ipywidgets.Label("three").add_class("python-counts")
head.observe(lambda _: setattr(counted, "value", f"tokens: {len(head.tokens)} {head.query}"), ["tokens", "query"])
ipywidgets.VBox([head, counted])""",
    "head.query = [2, -1]",
]


def chapter() -> nbformat.NotebookNode:
    """Return the notebook of the book's first page, with the number 12345 for every glued value, and more cells."""
    listed = notebooks.pages((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    page = notebooks.Book(ROOT / "book", listed, installed=True).notebook("index", defaultdict(lambda: "12345"))
    page.cells = [cell for cell in page.cells if cell.cell_type == "markdown"] + list(map(new_code_cell, CELLS))
    return page


@contextlib.contextmanager
def jupyterlab(folder: Path) -> Iterator[str]:
    """Start a JupyterLab on the loopback address without the user's settings, and yield its address."""
    home = folder / "jupyter"
    places = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **places, "PYTHONPATH": path, "JUPYTER_PREFER_ENV_PATH": "1"}
    environment.pop("ICL_LIB_BOOK_BUILD", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={folder / 'work'}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--LabApp.news_url=None"]
    log = folder / "jupyter.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output, cwd=folder)
        try:
            until = time.monotonic() + START
            while not (started := [path for path in (home / "runtime").glob("jpserver-*.json") if path.stat().st_size]):
                if server.poll() is not None or time.monotonic() > until:
                    pytest.fail(f"JupyterLab does not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
            yield json.loads(started[0].read_text())["url"].rstrip("/")
        finally:
            server.terminate()
            server.wait(timeout=30)


def test_a_chapter_in_jupyterlab(browser: Browser, tmp_path: Path):
    """The chapter opens as a notebook, Python receives what the reader moves, and the reader sees what Python draws."""
    (tmp_path / "work").mkdir()
    nbformat.write(chapter(), tmp_path / "work" / "chapter.ipynb")
    with jupyterlab(tmp_path) as address, visiting(browser, address) as visit:
        page = visit.page
        page.set_default_timeout(START * 1000)
        page.goto(f"{address}/lab/tree/chapter.ipynb?token={TOKEN}")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for()
        prose = page.locator(".jp-Notebook")
        expect(prose).to_contain_text("it answers 12345, with a probability of 12345", timeout=START * 1000)
        expect(prose.get_by_role("link", name="Brown et al., 2020")).to_have_attribute("href", re.compile("arxiv.org"))
        expect(prose.get_by_role("link", name="Cost", exact=True).first).to_be_visible()
        assert not re.search(r"\{[a-z:]+\}|:::", prose.inner_text())
        page.get_by_text("| Idle").wait_for()  # otherwise running the cells would ask which kernel to use
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        expect(page.locator(".jp-OutputArea-output svg[role=img]")).to_be_visible(timeout=START * 1000)

        playground = page.locator(".icl-playground")
        printed = playground.locator(".icl-residual output")
        python = page.locator(".python-sees")
        expect(python).to_have_text("nothing yet")
        handle = playground.locator(".icl-handle").first
        handle.scroll_into_view_if_needed()
        handle.focus()
        page.keyboard.press("ArrowUp")
        expect(python).to_have_text("python has a=[1.5, 0.5] applied=True")
        assert float(printed.get_attribute("data-residual")) < 1e-12
        box = handle.bounding_box()
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] / 2 - 40, box["y"] + box["height"] / 2 - 30, steps=4)
        page.mouse.up()
        expect(python).not_to_have_text("python has a=[1.5, 0.5] applied=True")
        assert float(printed.get_attribute("data-residual")) < 1e-12
        playground.get_by_role("switch").uncheck()
        expect(python).to_contain_text("applied=False")
        assert float(printed.get_attribute("data-residual")) > 0.1

        picture = page.locator(".jp-OutputArea-output svg[role=img]")
        expect(picture).to_have_attribute("aria-label", "x to the power of 1, dashed: False")
        page.locator(".widget-slider [role=slider], .widget-slider .noUi-handle").first.focus()
        page.keyboard.press("ArrowRight")
        expect(picture).to_have_attribute("aria-label", "x to the power of 2, dashed: False")
        page.locator(".widget-checkbox input").check()
        expect(picture).to_have_attribute("aria-label", "x to the power of 2, dashed: True")

        puzzle = page.locator(".icl-puzzle")
        puzzle.get_by_role("switch").check()
        expect(page.locator(".python-moved")).to_have_text("served: ['2+8']")
        assert [column.locator("b").first.inner_text() for column in puzzle.locator("ol").all()] == ["20", "7", "20"]

        head = page.locator(".icl-attention")
        expect(head.locator(".icl-handle.icl-a")).to_have_attribute("aria-valuetext", "x 2.00, y −1.00")
        expect(page.locator(".python-counts")).to_have_text("tokens: 3 [2.0, -1.0]")
        head.get_by_role("button", name="Add a token").click()
        expect(page.locator(".python-counts")).to_have_text("tokens: 4 [2.0, -1.0]")
        head.locator(".icl-token").first.focus()
        page.keyboard.press("Delete")
        expect(page.locator(".python-counts")).to_have_text("tokens: 3 [2.0, -1.0]")
        assert float(head.locator("[data-steps]").get_attribute("data-steps")) < 1e-12
        if shots := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{shots}/jupyterlab.png")
        assert visit.outside == []
