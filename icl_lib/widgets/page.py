"""Widgets on a page without a kernel, as HTML: their state, and a picture for readers without JavaScript."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

STATIC = Path(__file__).resolve().parents[1] / "static"
"""The front end: ES modules that anywidget loads and that the book bundles."""


IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.mjs";$', re.MULTILINE)


def module(name: str) -> str:
    """The text of a module of the front end, with the modules that it imports inside: anywidget takes one text only."""

    def inside(found: re.Match[str]) -> str:
        names, imported = found.groups()
        body = re.sub(r"^export default (?=\{)", "return ", module(imported), flags=re.MULTILINE)
        return f"const {names} = (() => {{\n{re.sub('^export ', '', body, flags=re.MULTILINE)}}})();"

    return IMPORT.sub(inside, (STATIC / f"{name}.mjs").read_text(encoding="utf-8"))


class Page:
    """HTML as the result of a cell of the book."""

    def __init__(self, text: str) -> None:
        self._text = text

    def _repr_html_(self) -> str:
        return self._text


def page_html(widget: str, state: Mapping[str, Any], fallback: str) -> str:
    r"""The HTML of a widget for a page without a kernel: its state, and what readers without JavaScript see.

    >>> page_html("explore", {"label": "</script>"}, "<p>a picture</p>")
    '<div class="icl-widget" data-widget="explore"><script type="application/json">{"label": "<\\/script>"}</script><p>a picture</p></div>'
    """  # noqa: E501
    text = json.dumps(state, allow_nan=False, ensure_ascii=False)
    text = text.replace("</", "<\\/").replace("<!--", "\\u003c!--")  # no text may end the script element
    return (
        f'<div class="icl-widget" data-widget="{html.escape(widget)}">'
        f'<script type="application/json">{text}</script>{fallback}</div>'
    )
