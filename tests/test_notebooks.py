"""The notebooks of the pages: they read like the site, run by themselves, and fit into the memory of Binder."""

from __future__ import annotations

import json
import re
from collections import defaultdict

import execution
import nbformat
import notebooks
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from tabulate import tabulate

MEMORY = 1024  # MiB; Binder gives one to two GB
LARGER = {"known-model": 2048, "compiling": 2048}  # they load a language model that people know
PAGES = notebooks.pages((ROOT / "_toc.yml").read_text(encoding="utf-8"))
BOOK = notebooks.Book(ROOT / "book", PAGES)


def prose(page: nbformat.NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in page.cells if cell.cell_type == "markdown")


@pytest.mark.parametrize("name", BOOK.notebooks)
def test_no_markup_of_the_site_is_left(name):
    page = BOOK.notebook(name, defaultdict(lambda: "12345"))
    nbformat.validate(page)
    text = prose(page)
    assert text.count("# ") >= 1
    assert not re.search(r"\{[a-z:]+\}`|^:{3}|^\([\w-]+\)=", text, re.MULTILINE)
    assert text.count("12345") == len(re.findall(r"\{glue:(?:text)?\}", BOOK.texts[name]))
    for linked in re.findall(r"\]\(([\w-]+)\.ipynb\)", text):
        assert linked in set(BOOK.notebooks) - {name}
    assert all(line.count("$$") in (0, 2) for line in text.split("\n") if line.startswith(">"))
    code = [cell.source for cell in page.cells if cell.cell_type == "code"]
    assert not any("myst_nb" in source for source in code)
    assert len(code) == BOOK.texts[name].count("```{code-cell}")


def test_what_a_page_says():
    text = prose(BOOK.notebook("theorem", defaultdict(lambda: "12345")))
    assert "**At all 12345 measurements the relative difference of the two losses is at most 12345.**" in text
    assert "[Theorem 1](deriving.ipynb) is Theorem 2.2 of [Dherin et al. (2025)](https://arxiv.org/" in text
    assert "<summary>Solution to Exercise 3</summary>" in text
    assert "> The optimiser and its learning rate are our choice" in text
    assert "pip install" in text
    on_binder = notebooks.Book(ROOT / "book", PAGES, installed=True)
    assert "pip install" not in prose(on_binder.notebook("cost", defaultdict(str)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{abc}`x`", r"\{abc\}`x`: no notebook can show this role"),
        (":::{tip} T\nx\n:::", r"\{tip\} T: no notebook"),
    ],
)
def test_what_no_notebook_can_show_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        BOOK.markdown(text, "index", {})


def test_a_name_that_is_not_glued_is_an_error():
    with pytest.raises(KeyError, match="every"):
        BOOK.notebook("theorem", {})


@pytest.mark.slow
def test_the_numbers_of_statements_are_those_of_the_site(site):
    for label, (page, title) in BOOK.titles.items():
        if re.fullmatch(r"[A-Z][a-z]+ \d+", title):
            html = (site / "book" / f"{page}.html").read_text(encoding="utf-8")
            box = html[html.index(f'id="{label}"') :]
            assert re.search(r'class="caption-number">(.*?) </span>', box)[1] == title


@pytest.mark.slow
def test_the_site_offers_notebooks_with_its_numbers(site):
    for name in BOOK.notebooks:
        assert f'href="../_sources/book/{name}.ipynb"' in (site / "book" / f"{name}.html").read_text(encoding="utf-8")
    text = prose(nbformat.read(site / "_sources" / "book" / "theorem.ipynb", as_version=4))
    assert re.search(r"At all \d+ measurements the relative difference of the two losses is at most \d\s×\s10⁻", text)


@pytest.mark.slow
def test_a_notebook_runs_in_an_empty_folder(site, tmp_path):
    page = nbformat.read(site / "_sources" / "book" / "index.ipynb", as_version=4)
    execution.use_this_checkout()
    NotebookClient(page, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [output.get("text", "") for cell in page.cells for output in cell.get("outputs", [])]
    assert any("bare question, edited block:   off by" in text for text in printed)


@pytest.mark.slow
def test_every_chapter_fits_into_the_memory_of_binder(site):
    """Print what the build measured: the seconds depend on what else ran, so only the memory has a bound."""
    took = json.loads((site.parent / execution.TOOK).read_text(encoding="utf-8"))
    rows = [(page, *took[f"book/{page}"].values()) for page in PAGES if "{code-cell}" in BOOK.texts[page]]
    print("\n" + tabulate(rows, headers=["chapter", "seconds", "peak memory, MiB"]))
    assert all(0 < peak < LARGER.get(name, MEMORY) for name, _, peak in rows)


def test_a_notebook_with_outputs_has_those_of_its_run_but_no_glued_values():
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("Text."), nbformat.v4.new_code_cell("1")])
    shown = {"text/html": "<svg/>", "application/vnd.jupyter.widget-view+json": {"model_id": "a"}}
    outputs = [
        nbformat.v4.new_output("stream", text="fine\n"),
        nbformat.v4.new_output("display_data", data={"text/plain": "1"}, metadata={"scrapbook": {"name": "one"}}),
        nbformat.v4.new_output("display_data", data=shown),
    ]
    ran = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=outputs, execution_count=3)])
    [_, cell] = notebooks.with_outputs(page, ran).cells
    assert cell.execution_count == 3
    assert [output.output_type for output in cell.outputs] == ["stream", "display_data"]
    assert cell.outputs[1].data == {"text/html": "<svg/>"}
    with pytest.raises(ValueError, match="shorter"):
        notebooks.with_outputs(page, nbformat.v4.new_notebook())
