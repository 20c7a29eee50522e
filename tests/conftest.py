"""Fixtures of the tests that need a browser, the built book or the book's Sphinx extensions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# As in the Makefile, for those who call pytest themselves: OpenMP reads it when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from browser import ARGUMENTS, HOW_TO_GET_ONE, find_chromium, served
from hypothesis import settings
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
BUILD = ["build", ".", "-W", "-n", "--keep-going"]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

# The same cases on every run; a case that fails is kept by writing it down as an example.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests in a browser or of the built book as slow, and put the files that take longest first.

    Those are the browser's, and then those with many tests. So two processes that share the files end together.
    """
    shown = [item for item in items if {"browser", "site"} & set(getattr(item, "fixturenames", ()))]
    for item in shown:
        item.add_marker("slow")
    first, tests = {item.path for item in shown}, Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in first, -tests[item.path]))


def build_book(folder: Path) -> tuple[int, str]:
    """Build the book in a copy of the project as `make book` does; gives the exit status and all that was printed."""
    command = [Path(sys.executable).with_name("jupyter-book"), *BUILD]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return run.returncode, re.sub(r"\x1b\[[0-9;]*m", "", run.stdout + run.stderr)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Random numbers that a test draws without naming a seed are the same on every run."""
    torch.manual_seed(0)


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
        status, output = build_book(ROOT)
        if status:
            pytest.fail(f"the book does not build:\n{output[-8000:]}")
    return folder


@pytest.fixture(scope="session", params=["http", "file"])
def address(request: pytest.FixtureRequest, site: Path) -> Iterator[str]:
    """Where the book is: on a web server, and on the disk."""
    if request.param == "file":
        yield site.as_uri()
    else:
        with served(site) as url:
            yield url
