"""The build: what makes it fail, and the pages of a small book."""

import json
import re
import shutil
import struct
from pathlib import Path

import execution
import pytest
from conftest import BUILD, ROOT, build_book

pytestmark = pytest.mark.slow
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
    if complaint == "ZeroDivisionError":  # the last that is printed
        assert output.rstrip().endswith("ZeroDivisionError: division by zero")
        assert "book/page: a cell failed." in output[-2000:]


def test_the_cache_is_used_and_keeps_what_was_measured(tmp_path):
    folder = copy_of_the_project(tmp_path)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    for text, executed in (("", True), ("\nA sentence.\n", False)):
        (folder / "book" / "page.md").write_text(PAGE % "print('fine')" + text)
        status, output = build_book(folder)
        assert status == 0, output[-3000:]
        assert ("book/page: executed in" in output) == executed
        took = json.loads((folder / "_build" / execution.TOOK).read_text(encoding="utf-8"))["book/page"]
        assert took["seconds"] > 0
        assert took["peak_mib"] > 10


def test_a_broken_formula_fails_the_build(tmp_path, site):
    folder = copy_of_the_project(tmp_path)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/deriving\n")
    # The cached outputs of an earlier build must not hide the broken formula.
    shutil.copytree(site.parent / ".jupyter_cache", folder / "_build" / ".jupyter_cache")
    theorem = folder / "icl_lib" / "theorem.py"
    formula = "return LowRank(left.unsqueeze(-1)"
    source = theorem.read_text()
    assert formula in source
    theorem.write_text(source.replace(formula, "return LowRank(2 * left.unsqueeze(-1)"))
    status, output = build_book(folder)
    assert status != 0
    assert "AssertionError" in output


@pytest.fixture(scope="module")
def small_book(tmp_path_factory) -> Path:
    """The built pages of a book with two pages, for a site with an address."""
    folder = copy_of_the_project(tmp_path_factory.mktemp("small"))
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/page\nchapters: [{file: book/second}]\n")
    second = PAGE.replace("---\n", "---\nafter: page\n", 1).replace("# A page", "# A second page\n\nIt is short.")
    (folder / "book" / "second.md").write_text(second % "print('fine')")
    cell = "import time\nfor number in range(4):\n    print(number, flush=True)\n    time.sleep(0.3)"
    (folder / "book" / "page.md").write_text(PAGE.replace("# A page\n", "# A page\n\nOne sentence.\n") % cell)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICL_LIB_SITE_URL", "https://example.org/paper")
        status, output = build_book(folder)
    assert status == 0, output[-3000:]
    return folder / "_build" / "html"


def test_a_loop_prints_into_one_box(small_book):
    page = (small_book / "book" / "page.html").read_text(encoding="utf-8")
    boxes = re.findall(r'<div class="output stream.*?</div>', page, re.DOTALL)
    assert len(boxes) == 1
    assert re.sub(r"<[^>]+>", "", boxes[0]).split() == ["0", "1", "2", "3"]


def test_a_site_with_an_address_has_pictures_in_its_previews(small_book):
    page = (small_book / "book" / "page.html").read_text(encoding="utf-8")
    for tag in (
        '<meta property="og:url" content="https://example.org/paper/book/page.html" />',
        '<meta property="og:image" content="https://example.org/paper/_static/preview.png" />',
        '<meta property="og:description" content="One sentence." />',
        '<meta name="twitter:card" content="summary_large_image" />',
        '<link rel="canonical" href="https://example.org/paper/book/page.html" />',
    ):
        assert page.count(tag) == 1, tag
    assert page.count("og:image:alt") == 1
    picture = (small_book / "_static" / "preview.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (1200, 630)
    assert len(picture) < 60_000


def test_a_chapter_has_its_own_picture_and_says_how_to_read_and_cite_it(small_book):
    page = (small_book / "book" / "second.html").read_text(encoding="utf-8")
    address = "https://example.org/paper/book/second.html"
    assert page.count('content="https://example.org/paper/_static/preview-second.png"') == 1
    own, shared = (small_book / "_static" / name for name in ("preview-second.png", "preview.png"))
    assert own.read_bytes() != shared.read_bytes()
    byline = re.search(r'</h1>\n<p class="byline">(.*?)</p>', page)[1]
    assert byline.startswith('1 minute · read <a href="page.html">A page</a> first · version ')
    assert f"The icl_lib authors · {address}" in byline
    entry = re.search(r'<details class="cite">.*?<pre>(.*?)</pre>', page, re.DOTALL)[1]
    assert re.match(r"@incollection{icl-lib-second,\n  author    = {{The icl_lib authors}},\n", entry)
    assert f"  url       = {{{address}}},\n" in entry
    first = (small_book / "book" / "page.html").read_text(encoding="utf-8")
    assert 'class="byline"' not in first
    assert "@misc{icl-lib," in first


def test_an_address_that_is_none_fails_the_build(tmp_path, monkeypatch):
    folder = copy_of_the_project(tmp_path)
    (folder / "_toc.yml").write_text("format: jb-book\nroot: book/page\n")
    (folder / "book" / "page.md").write_text("# A page\n")
    monkeypatch.setenv("ICL_LIB_SITE_URL", "example.org")
    status, output = build_book(folder)
    assert status != 0
    assert "ICL_LIB_SITE_URL is 'example.org': give the site's address" in output
