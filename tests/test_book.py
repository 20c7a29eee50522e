"""The build: it fails when a cell raises, when one warns, and when a formula of the library is wrong."""

import shutil
from pathlib import Path

import pytest
from conftest import BUILD, ROOT, build_book

PAGE = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
---
# A page

```{code-cell} ipython3
%s
```
"""


def copy_of_the_project(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("_build", ".*", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(ROOT, folder / "project", ignore=ignored))


def test_this_is_how_make_builds():
    assert " ".join(["jupyter-book", *BUILD]) in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("cell", "complaint"),
    [
        ("print('fine')", None),
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('watch out')", "stderr was found in the cell outputs"),
    ],
    ids=["a good cell", "raises", "warns"],
)
def test_a_cell_that_fails_fails_the_build(tmp_path, cell, complaint):
    folder = copy_of_the_project(tmp_path)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    (folder / "book" / "page.md").write_text(PAGE % cell)
    status, output = build_book(folder)
    assert (status == 0) == (complaint is None), output[-3000:]
    if complaint is not None:
        assert complaint in output


def test_a_broken_formula_fails_the_build(tmp_path, site):
    folder = copy_of_the_project(tmp_path)
    # What an earlier build has stored of its pages must not hide the break.
    shutil.copytree(site.parent / ".jupyter_cache", folder / "_build" / ".jupyter_cache")
    theorem = folder / "icl_lib" / "theorem.py"
    formula = "return LowRank(left.unsqueeze(-1)"
    source = theorem.read_text()
    assert formula in source
    theorem.write_text(source.replace(formula, "return LowRank(2 * left.unsqueeze(-1)"))
    status, output = build_book(folder)
    assert status != 0
    assert "AssertionError" in output
