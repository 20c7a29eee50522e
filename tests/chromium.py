"""Find a Chromium for the tests, and install one where there is none: Debian's, or else Playwright's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from browser import HOW_TO_GET_ONE, find_chromium
from playwright.sync_api import sync_playwright


def found() -> str | None:
    """The path of a Chromium, if there is one now."""
    with sync_playwright() as playwright:
        return find_chromium(playwright)


def attempts() -> list[list[list[str]]]:
    """The ways to install one here, each a list of commands."""
    ways = []
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if shutil.which("apt-get") and (not as_root or shutil.which("sudo")):
        ways.append([[*as_root, "apt-get", "update"], [*as_root, "apt-get", "install", "--yes", "chromium"]])
    return [*ways, [[sys.executable, "-m", "playwright", "install", "chromium"]]]


def main() -> None:
    """Make sure that there is a Chromium, or exit and say how to get one."""
    path = found()
    for way in attempts() if path is None else []:
        for command in way:
            print("+", *command, flush=True)
            if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode:
                break
        path = found()
        if path:
            break
    if path is None:
        sys.exit(HOW_TO_GET_ONE)
    print("the browser of the tests:", path)


if __name__ == "__main__":
    main()
