"""Numbered figures and tables: what the directive accepts, and that each has a caption and is referred to."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from icl_lib.paper.tables import table

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book").glob("*.md"))}
CAPTION = re.compile(r"^:::\{caption\} ([\w-]+)\n(?::kind: (\w+)\n)?(.+?)^:::$", re.M | re.S)


@pytest.mark.parametrize("page", PAGES)
def test_every_caption_states_a_finding_and_is_referred_to(page):
    for label, kind, text in CAPTION.findall(PAGES[page]):
        assert label.startswith("tab-" if kind == "table" else "fig-"), label
        assert re.match(r"\*\*[^*]+\*\*", text), f"{label}: begin with the finding, in bold"
        assert f"{{numref}}`{label}`" in PAGES[page], f"{label}: the text does not refer to it"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "{caption}" in PAGES[page]])
def test_a_caption_and_its_output_are_one_figure(site, page):
    html = (site / "book" / f"{page}.html").read_text(encoding="utf-8")
    figures = re.findall(r'<figure class="numbered[^"]*".*?</figure>', html, re.S)
    assert len(figures) == len(CAPTION.findall(PAGES[page]))
    for figure in figures:
        assert re.search(r'class="caption-number">(Figure|Table) \d+ ', figure)
        assert "cell_output" in figure or "<table" in figure
        assert "cell_input" not in figure


def test_a_table_aligns_numbers_and_marks_rounding():
    rows = [{"edit": "own", "error": 2e-16, "control": 0.3}, {"edit": "none", "error": 0.2, "control": 3e-10}]
    text = table(rows).data
    rule, own, none = text.split("\n")[1:]
    assert re.fullmatch(r"\|:-+\|-+:\|-+:\|", rule)
    assert [line.count("icl-rounding") for line in (own, none)] == [1, 0]
    with pytest.raises(ValueError, match=r"rows is empty"):
        table([])
    with pytest.raises(ValueError, match=r"rows\[1\] has the columns \['b'\]"):
        table([{"a": 1}, {"b": 1}])
