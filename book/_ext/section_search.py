"""The search: a list of the book's sections with their text, and the script that searches it.

Both are one file, which book.js loads when a reader begins to search. It is a classic script, so it loads from the disk
too. The text is that of the finished pages, with formulas in letters, and without menus, code and drawings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

SCRIPT = "search.js"
CLIENT = Path(__file__).resolve().parents[1] / "_static" / SCRIPT
_ARTICLE = re.compile(r"<article\b.*?</article>", re.DOTALL)
# Removed first, because most of a page's characters are in these.
_SKIPPED = re.compile(r"<(script|style|svg|pre|button|noscript|mjx-math)\b.*?</\1>", re.DOTALL)
_LEFT_OUT = {"headerlink", "prev-next-area", "eqno", "claim-mark", "expanded"}  # "Hide …" stands beside "Show …"
_VOID = {"br", "hr", "img", "input", "wbr", "col", "meta", "link"}


class Section(NamedTuple):
    """A part of a page that a reader can be led to."""

    anchor: str
    title: str
    text: str


class _Sections(HTMLParser):
    """Divides an article at its headings, and at the functions and classes that it describes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str], list[str]]] = []  # anchor, title, text
        self.anchors: list[tuple[str, str]] = []  # the open elements, with the anchors of the sections
        self.title: str | None = None  # the open heading
        self.hidden = 0  # how many open elements are not part of the text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        classes = (given.get("class") or "").split()
        if tag in _VOID:
            return
        if self.hidden or _LEFT_OUT & {*classes}:
            self.hidden += 1
        self.anchors.append((tag, given.get("id") or "" if tag == "section" else ""))
        if re.fullmatch("h[1-6]", tag) and not self.hidden:
            anchor = next((anchor for _, anchor in reversed(self.anchors) if anchor), "")
            self.found.append((anchor, [], []))
            self.title = tag
        elif tag == "dt" and "sig" in classes and given.get("id"):
            self.found.append((given["id"], [given["id"].removeprefix("icl_lib.")], []))
            self.hidden += 1  # the signature

    def handle_endtag(self, tag: str) -> None:
        if not self.anchors:
            return
        if self.hidden:
            self.hidden -= 1
        elif tag == self.title:
            self.title = None
        self.anchors.pop()
        if self.found and tag in ("p", "li", "td", "th", "dd", "div"):
            self.found[-1][2].append(" ")

    def handle_data(self, data: str) -> None:
        if self.found and not self.hidden:
            _, title, text = self.found[-1]
            (title if self.title else text).append(data)


def sections(page: str) -> Iterator[Section]:
    """Yield the sections of a finished page.

    >>> heading = '<h1>A <em>title</em><a class="headerlink">#</a></h1>'
    >>> list(sections(f'<article><section id="one">{heading}<p>Text.</p></section></article>'))
    [Section(anchor='one', title='A title', text='Text.')]
    """
    article = _ARTICLE.search(page)
    if article is None:
        return
    reader = _Sections()
    reader.feed(_SKIPPED.sub("", article[0]))
    for anchor, title, text in reader.found:
        yield Section(anchor, " ".join("".join(title).split()), " ".join("".join(text).split()))


def write(app: Any, exception: Exception | None) -> None:
    """Write the sections of all pages in reading order, and the script that searches them."""
    if exception is not None or app.builder.format != "html":
        return
    listed = []
    for page in [
        app.config.root_doc,
        *app.env.toctree_includes.get(app.config.root_doc, []),
        *sorted(app.env.found_docs),
    ]:
        file = Path(app.builder.get_outfilename(page))
        if file.exists() and page not in [known for known, _ in listed]:
            listed.append((page, [*sections(file.read_text(encoding="utf-8"))]))
    found = [[app.builder.get_target_uri(page), parts] for page, parts in listed if parts]
    index = json.dumps(found, ensure_ascii=False, separators=(",", ":"))
    script = f"(() => {{\nconst pages = {index};\n{CLIENT.read_text(encoding='utf-8')}}})();\n"
    (Path(app.outdir) / "_static" / SCRIPT).write_text(script, encoding="utf-8")


def search_page(app: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Give the page of results, without Sphinx's own search."""
    if app.builder.format == "html":
        yield "search", {}, "search.html"


def turn_off(app: Any) -> None:
    """Let Sphinx write no index of its own."""
    if app.builder.format == "html":
        app.builder.search = False


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", turn_off)
    app.connect("html-collect-pages", search_page)
    app.connect("build-finished", write, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
