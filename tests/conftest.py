"""Fixtures of the tests that need a browser, the built book or the book's Sphinx extensions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import ARGUMENTS, HOW_TO_GET_ONE, find_chromium, served
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book" / "_ext"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium. Without one the tests fail, they do not skip."""
    with sync_playwright() as playwright:
        path = find_chromium(playwright)
        if path is None:
            pytest.fail(HOW_TO_GET_ONE)
        chromium = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the built book; built now if `make book` has not done it."""
    folder = ROOT / "_build" / "html"
    if not (folder / "index.html").exists():
        command = [sys.executable, "-m", "jupyter_book", "build", ".", "-W", "-n", "--keep-going"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            pytest.fail(f"the book does not build:\n{run.stdout[-4000:]}\n{run.stderr[-4000:]}")
    return folder


@pytest.fixture(scope="session", params=["http", "file"])
def address(request: pytest.FixtureRequest, site: Path) -> Iterator[str]:
    """Where the book is: on a web server, and on the disk."""
    if request.param == "file":
        yield site.as_uri()
    else:
        with served(site) as url:
            yield url
