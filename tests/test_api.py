"""The pages of the library: each begins with a sentence and an example, and together they have every module once."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import notebooks
import pytest
from conftest import ROOT

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book" / "api").glob("*.md"))}
LISTED = notebooks.pages((ROOT / "_toc.yml").read_text(encoding="utf-8"))
AUTOMODULE = re.compile(r"^\.\. automodule:: icl_lib\.([\w.]+)\n((?:   :.*\n)*)", re.MULTILINE)
COMMANDS = {"__main__", "cli.compiling", "paper.hidden_rule.__main__"}  # the command line has a page of its own


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_a_sentence_and_an_example(name):
    opening = rf"\(api-{name}\)=\n# [^\n]+\n\n(?P<lead>\S.*?[.])\n\n```python\n.+?\n```\n"
    first = re.match(opening, PAGES[name], re.DOTALL)
    assert first
    assert "```" not in first["lead"]


def test_the_pages_are_listed_and_the_overview_leads_to_each():
    assert {f"api/{name}" for name in PAGES} == {page for page in LISTED if page.startswith("api/")}
    overview = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    assert re.findall(r"\{ref\}`api-([\w-]+)`", overview) == [page[4:] for page in LISTED if page.startswith("api/")]


def modules(folder: Path) -> list[str]:
    """The modules below the package that hold more than a docstring and imports."""
    names = (".".join(path.relative_to(folder).with_suffix("").parts) for path in sorted(folder.rglob("*.py")))
    return [name for name in names if not name.endswith("__init__")]


def test_every_module_is_on_one_page():
    shown = Counter(module for text in PAGES.values() for module, _ in AUTOMODULE.findall(text))
    assert max(shown.values()) == 1
    whole = {name for text in PAGES.values() for name, options in AUTOMODULE.findall(text) if "imported" in options}
    missing = {name for name in modules(ROOT / "icl_lib") if name not in shown and name.rpartition(".")[0] not in whole}
    assert missing == COMMANDS
