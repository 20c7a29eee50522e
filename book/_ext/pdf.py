"""The whole book as one PDF, printed from the built pages by Chromium: ``python book/_ext/pdf.py``.

Each page of the book becomes a chapter with a bookmark, in reading order; the pages of the library's reference are
left out. A title page with the contents comes first, each sheet has a number, and links between chapters lead to the
place in the PDF. Links to pages that are left out lead to the website, if ``ICL_LIB_SITE_URL`` says where it is.
"""

from __future__ import annotations

import html
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import byline
import notebooks
from playwright.sync_api import Browser, Page
from previews import site_url
from pypdf import PdfReader, PdfWriter
from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, NullObject

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "_build" / "html"
sys.path.append(str(ROOT / "tests"))
from browser import chromium, settle  # noqa: E402

PAPER = {"format": "A4", "prefer_css_page_size": True, "print_background": True}
SHEET = "<style>@page { size: A4; margin: %s } body { font: 11pt/1.5 sans-serif; color: #222; margin: 0 }</style>"
OUTLINED = """(anchors) => {
  // Chromium notes the places that links on the same page lead to: these links are for those on other pages.
  for (const anchor of anchors) {
    const link = document.createElement("a");
    link.href = `#${anchor}`;
    link.style.display = "none";
    document.body.append(link);
  }
  dispatchEvent(new Event("beforeprint"));
}"""


def published() -> str:
    """The address of the website, or nothing."""
    return site_url(os.environ.get("ICL_LIB_SITE_URL", ""))


@dataclass
class Chapter:
    """A printed page of the book, its title, and where it begins in the PDF, counted from 0."""

    page: str
    title: str
    printed: PdfReader
    start: int = 0


def wanted(pages: Sequence[str]) -> dict[str, set[str]]:
    """For each page, the anchors to which other pages of these link."""
    found: dict[str, set[str]] = {page: set() for page in pages}
    for page in pages:
        text = (SITE / "book" / f"{page}.html").read_text(encoding="utf-8")
        for target, anchor in re.findall(r'href="([\w-]+)\.html#([^"]+)"', text):
            if target in found:
                found[target].add(unquote(html.unescape(anchor)))
    return found


def print_page(browser_page: Page, page: str, anchors: set[str]) -> Chapter:
    """Print one page of the book."""
    browser_page.goto((SITE / "book" / f"{page}.html").as_uri())
    browser_page.evaluate(OUTLINED, sorted(anchors))
    settle(browser_page)
    title = browser_page.locator("article h1").first.evaluate("(node) => node.firstChild.textContent.trim()")
    return Chapter(page, title, PdfReader(io.BytesIO(browser_page.pdf(**PAPER, outline=True, tagged=True))))


def render(browser_page: Page, text: str) -> PdfReader:
    """Print a small page that is written here."""
    browser_page.set_content(text)
    return PdfReader(io.BytesIO(browser_page.pdf(**PAPER)))


def contents(chapters: Sequence[Chapter]) -> str:
    """The title page with the contents."""
    facts = byline.citation()
    title, _, below = facts["title"].partition(": ")
    lines = "".join(f"<tr><td>{html.escape(one.title)}</td><td>{one.start + 1}</td></tr>" for one in chapters)
    below_title = [", ".join(byline.authors()), byline.edition().replace("v", "V", 1), published()]
    return (
        SHEET % "30mm 25mm"
        + "<style>h1 { font-size: 26pt; line-height: 1.2; margin: 0 } td + td { text-align: right }"
        + "table { width: 100%; margin-top: 10mm; border-spacing: 0 1.2mm }</style>"
        + f"<h1>{html.escape(title)}</h1><p>{html.escape(below)}</p>"
        + f"<p>{'<br>'.join(map(html.escape, filter(None, below_title)))}</p><table>{lines}</table>"
    )


def numbers(count: int) -> str:
    """Sheets that are empty but for their number."""
    style = (
        "<style>div { height: 277mm; break-after: page; position: relative }"
        "span { position: absolute; bottom: 0; right: 0; font-size: 9pt; color: #666 }</style>"
    )
    return SHEET % "10mm 17mm" + style + "".join(f"<div><span>{at + 1}</span></div>" for at in range(count))


def leaves(writer: PdfWriter, start: int, count: int) -> Iterator[DictionaryObject]:
    """The annotations of some pages."""
    for page in writer.pages[start : start + count]:
        for annotation in page.get("/Annots", []):
            yield annotation.get_object()


def connect(writer: PdfWriter, chapters: Sequence[Chapter], address: str) -> None:
    """Let every link lead to its place in the PDF, to the website, or nowhere."""
    places = {one.page: one.printed.named_destinations for one in chapters}
    by_page = {one.page: one for one in chapters}

    def at(page: str, anchor: str) -> ArrayObject:
        chapter, found = by_page[page], places[page].get(f"/{anchor}") or places[page].get(anchor)
        sheet = chapter.printed.get_destination_page_number(found) if found else 0
        top = FloatObject(found.top) if found and found.top is not None else NullObject()
        place = [
            writer.pages[chapter.start + sheet].indirect_reference,
            NameObject("/XYZ"),
            NullObject(),
            top,
            NullObject(),
        ]
        return ArrayObject(place)

    for chapter in chapters:
        for link in leaves(writer, chapter.start, len(chapter.printed.pages)):
            if "/Dest" in link and not isinstance(link["/Dest"], ArrayObject):
                link[NameObject("/Dest")] = at(chapter.page, str(link["/Dest"]).removeprefix("/"))
            uri = str(link.get("/A", {}).get("/URI", ""))
            if not uri.startswith("file:"):
                continue
            file, anchor = urldefrag(uri)
            name = unquote(file).rpartition("/book/")[2].removesuffix(".html")
            if name in by_page:
                del link["/A"]
                link[NameObject("/Dest")] = at(name, unquote(anchor))
            elif address:
                link["/A"][NameObject("/URI")] = type(link["/A"]["/URI"])(uri.replace(f"{SITE.as_uri()}/", address))
            else:
                del link["/A"]


def outline(writer: PdfWriter, chapter: Chapter) -> None:
    """Write the bookmark of a chapter, and of its sections below it."""
    top = writer.add_outline_item(title=chapter.title, page_number=chapter.start)
    for item in _flat(chapter.printed.outline):
        sheet = chapter.start + chapter.printed.get_destination_page_number(item)
        writer.add_outline_item(title=item["/Title"], page_number=sheet, parent=top)


def _flat(items: Sequence[Any], depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """The bookmarks of the second level: the sections of a page."""
    for item in items:
        if isinstance(item, list):
            yield from _flat(item, depth + 1)
        elif depth == 1:
            yield item


def write(path: Path, browser: Browser) -> list[Chapter]:
    """Write the book; gives its chapters."""
    listed = notebooks.pages((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    listed = [page for page in listed if "/" not in page]
    anchors = wanted(listed)
    tab = browser.new_page()
    chapters = [print_page(tab, page, anchors[page]) for page in listed]
    at = len(render(tab, contents(chapters)).pages)
    for chapter in chapters:
        chapter.start, at = at, at + len(chapter.printed.pages)
    front, feet = render(tab, contents(chapters)), render(tab, numbers(at))
    tab.close()
    writer = PdfWriter()
    for printed in [front, *(chapter.printed for chapter in chapters)]:
        for sheet in printed.pages:
            writer.add_page(sheet)
    for sheet, foot in zip(writer.pages, feet.pages[:at], strict=True):
        sheet.merge_page(foot)
    connect(writer, chapters, published())
    for chapter in chapters:
        outline(writer, chapter)
    writer.add_metadata({"/Title": byline.citation()["title"], "/Author": ", ".join(byline.authors())})
    writer.page_mode = "/UseOutlines"
    writer.compress_identical_objects()
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write(path)
    return chapters


def main() -> None:
    """Print the book that is built."""
    with chromium() as browser:
        path = ROOT / "_build" / "book.pdf"
        chapters = write(path, browser)
    print(f"The book is printed, {len(chapters)} chapters: {path}")


if __name__ == "__main__":
    main()
