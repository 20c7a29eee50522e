"""A page of widgets for tests in a browser, without the book."""

from __future__ import annotations

import shutil
from pathlib import Path

import page_assets

PAGE = """<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8"><title>Widgets</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="widgets.css">
%s<script defer src="widgets.js"></script><body>%s"""


def widgets_page(folder: Path, *shown: str, model: bool = False) -> str:
    """Write ``index.html`` with the HTML of widgets and what a page of the book loads for them; returns the address."""
    modules = {path.stem: path.read_text(encoding="utf-8") for path in page_assets.STATIC.glob("*.mjs")}
    mount = (page_assets.STATIC / "mount.js").read_text(encoding="utf-8")
    (folder / "widgets.js").write_text(page_assets.bundle(modules, mount), encoding="utf-8")
    shutil.copyfile(page_assets.STATIC / "widgets.css", folder / "widgets.css")
    script = ""
    if model:
        (folder / "hidden_rule.js").write_text(page_assets.model_script(page_assets.MODEL), encoding="utf-8")
        script = '<script defer src="hidden_rule.js"></script>'
    (folder / "index.html").write_text(PAGE % (script, "".join(shown)), encoding="utf-8")
    return folder.as_uri()
