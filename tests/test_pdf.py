"""The book as one PDF: its chapters, its sheets and its links."""

from __future__ import annotations

import re
from pathlib import Path

import pdf
import pytest
from playwright.sync_api import Browser
from pypdf import PdfReader


@pytest.fixture(scope="module")
def printed(browser: Browser, site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PdfReader, list]:
    path = tmp_path_factory.mktemp("pdf") / "book.pdf"
    chapters = pdf.write(path, browser)
    return PdfReader(path), chapters


def test_every_chapter_has_a_bookmark_at_its_title_and_a_line_in_the_contents(printed):
    reader, chapters = printed
    tops = [item for item in reader.outline if not isinstance(item, list)]
    assert [item["/Title"] for item in tops] == [chapter.title for chapter in chapters]
    assert len(chapters) > 15
    contents = reader.pages[0].extract_text()
    for item, chapter in zip(tops, chapters, strict=True):
        at = reader.get_destination_page_number(item)
        assert at == chapter.start
        assert chapter.title in " ".join(reader.pages[at].extract_text().split())
        assert re.search(rf"{re.escape(chapter.title)}\s+{at + 1}\b", contents)


def test_no_sheet_is_empty_and_each_has_its_number(printed):
    reader, _ = printed
    for at, sheet in enumerate(reader.pages):
        text = sheet.extract_text()
        assert re.search(rf"\b{at + 1}\s*$", text), at
        drawn = len(sheet.get_contents().get_data())
        assert len(text) > 60 or drawn > 5000, f"sheet {at + 1} is nearly empty"


def test_figures_formulas_and_folds_are_printed(printed):
    reader, chapters = printed
    theorem = next(chapter for chapter in chapters if chapter.page == "theorem")
    sheets = reader.pages[theorem.start : theorem.start + len(theorem.printed.pages)]
    text = " ".join(" ".join(sheet.extract_text().split()) for sheet in sheets)
    assert re.search(r"Figure \d+ The edited model, without the prompt", text)
    assert "Solution to Exercise" in text, "folded solutions are open"
    assert "@incollection{icl-lib-theorem," in text
    assert "Move the slider" in text
    assert "∥a0∥2" in text, "formulas are typeset, and can be searched"


def test_links_lead_into_the_pdf_or_to_other_sites(printed):
    reader, _ = printed
    inside = 0
    for sheet in reader.pages:
        for link in (link.get_object() for link in sheet.get("/Annots", [])):
            assert not str(link.get("/A", {}).get("/URI", "")).startswith(("file:", "http://127."))
            inside += "/Dest" in link
    assert inside > 500
