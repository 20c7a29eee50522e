"""The README, the API page, the pinned packages and the direction of imports."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from icl_lib.paper.figures import PLANE_EXAMPLE, rank_one_picture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# A module or package imports only those before it in this list; within a package, no two modules import each other.
LAYERS = [
    "validation",
    "environment",
    "pretrained",
    "measures",
    "low_rank",
    "theorem",
    "least_squares",
    "output_updates",
    "blocks",
    "models",
    "cli",
    "dynamics",
    "constructions",
    "paper",
    "widgets",
]


def pins(file):
    found = re.findall(r"^([\w.-]+)==([\w.]+?)(?:\+cpu)?(?:;.*)?$", (ROOT / file).read_text(), re.MULTILINE)
    return dict(reversed(found))  # of several pins, the first is for newer Pythons, and Binder has one of those


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_paths_and_targets_that_a_page_names_exist(page):
    text = (ROOT / page).read_text()
    for path in re.findall(r"(?<=\]\()(?!https?:)[^)]+", text) + re.findall(
        r"`((?:book|icl_lib|tests|\.binder)/[^`]*)`", text
    ):
        assert (ROOT / path).exists(), path
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"\bmake ([a-z]+)\b", text):
        assert target in targets, target


def test_the_readme_picture_is_what_the_library_draws(tmp_path):
    rank_one_picture(**PLANE_EXAMPLE).save(tmp_path / "drawn.svg")
    assert (tmp_path / "drawn.svg").read_text() == (ROOT / "book/_static/rank-one.svg").read_text(), (
        "run `make picture`"
    )


def test_binder_installs_what_the_book_was_built_with():
    book, binder = pins("requirements.txt"), pins(".binder/requirements.txt")
    shared = book.keys() & binder.keys()
    assert {"torch", "sympy", "ipywidgets", "matplotlib"} <= shared
    assert {name: binder[name] for name in shared} == {name: book[name] for name in shared}


def test_every_reference_is_cited_and_every_citation_has_one():
    chapters = [page.read_text(encoding="utf-8") for page in (ROOT / "book").glob("*.md")]
    cited = {key for text in chapters for keys in re.findall(r"\{cite:\w+\}`([^`]+)`", text) for key in keys.split(",")}
    listed = re.findall(r"^@\w+\{([^,]+),$", (ROOT / "book/references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(cited)


def imports(path):
    """The modules of icl_lib that a file imports, from the package downward."""
    nodes = ast.walk(ast.parse(path.read_text()))
    names = [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.removeprefix("icl_lib.") for name in names if name.startswith("icl_lib.")}


def name_of(path):
    return path.relative_to(ROOT / "icl_lib").with_suffix("").as_posix().replace("/", ".")


FILES = {name_of(path): imports(path) for path in sorted((ROOT / "icl_lib").rglob("*.py")) if path.stem != "__init__"}


def test_imports_go_one_way():
    for name, used in FILES.items():
        layer = name.split(".")[0]
        tops = {other.split(".")[0] for other in used} - {layer}
        if layer == "symbolic":
            assert not tops, f"{name} imports {tops}, but the derivations stand alone"
        elif layer != "__main__":
            assert tops <= set(LAYERS[: LAYERS.index(layer)]), f"{name} imports {tops}"


def test_no_two_modules_import_each_other():
    graph = {name: used & FILES.keys() for name, used in FILES.items()}
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph)
    with pytest.raises(CycleError):  # the sorter notices a circle
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def readme_rows():
    """The modules of icl_lib that each row of the README's table names, in its order."""
    rows = re.findall(r"^\| (`(?:icl_lib|book|tests)/.*?) \|", README, re.MULTILINE)
    names = [re.findall(r"`(?:icl_lib/)?([\w/.]+)`", row) for row in rows if row.startswith("`icl_lib")]
    return [[name.removesuffix(".py").rstrip("/") for name in row] for row in names]


def test_the_readme_table_lists_every_module_in_the_order_of_imports():
    rows = readme_rows()
    listed = [name for row in rows for name in row]
    package = ROOT / "icl_lib"
    found = {path.stem for path in package.iterdir() if not path.name.startswith(("__", "py.typed"))}
    assert sorted(listed) == sorted(found)
    for at, row in enumerate(rows):
        known = {name for earlier in rows[: at + 1] for name in earlier}
        for name in row:
            for path in sorted((package / name).rglob("*.py")) or [package / f"{name}.py"] * (name != "static"):
                used = set(re.findall(r"^\s*(?:from|import) icl_lib\.(\w+)", path.read_text(), re.MULTILINE))
                assert used <= known, f"{path.name} imports {used - known}, which the README lists below {name}"
