"""The README, the API page, the pinned packages and the direction of imports."""

import ast
import re
from pathlib import Path

import pytest

from icl_lib.figures import PLANE_EXAMPLE, rank_one_picture

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# A module imports only modules that come before it in this list.
LAYERS = [
    "validation environment measures sweep low_rank theorem outer running_average contextual structure edits block "
    "transformer anatomy report patch language.architectures language.shadow language.places language.watch "
    "language.call language.adapter language.block_patch language.finder language.passes language.patch "
    "language.absorb language.verification language.generation language.text absorb verification cli __main__ "
    "dynamics.prefixes "
    "dynamics.path dynamics.lms dynamics.from_left dynamics.task regression fine_tuning experiments.one_block "
    "experiments.alignment experiments.every_block experiments.paper_scale experiments.token_by_token "
    "experiments.language experiments.__main__ hidden_rule.task hidden_rule.reference hidden_rule.evaluation "
    "hidden_rule.training hidden_rule.checkpoint hidden_rule.__main__ figures plots.one_block plots.cost "
    "plots.every_block plots.token_by_token plots.language widgets.page widgets.playground widgets.explorer",
    "symbolic.algebra symbolic.notation symbolic.layout symbolic.compiled symbolic.derivation symbolic.weight_update "
    "symbolic.solution_set symbolic.uniqueness symbolic.bias_update symbolic.single_token_attention "
    "symbolic.position_weight_update symbolic.position_bias_update symbolic.shared_factor symbolic.alignment "
    "symbolic.hidden_permutation symbolic.any_block symbolic.output_update symbolic.scale_update "
    "symbolic.turning_update symbolic.joint_weight_update symbolic.expert_updates symbolic.linear_losses "
    "symbolic.running_average symbolic.normalised_lms symbolic.normalised_lms_heads symbolic.eaten_from_left",
]


def pins(file):
    found = re.findall(r"^([\w.-]+)==([\w.]+?)(?:\+cpu)?(?:;.*)?$", (ROOT / file).read_text(), re.MULTILINE)
    return dict(reversed(found))  # of several pins, the first is for newer Pythons, and Binder has one of those


@pytest.mark.parametrize(("page", "count"), [("README.md", 4), ("book/api.md", 1)])
def test_the_examples_run_in_order(page, count):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(examples) == count
    exec(compile("\n".join(examples), page, "exec"), {})


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


@pytest.mark.parametrize("layers", LAYERS, ids=["library", "symbolic"])
def test_imports_go_one_way(layers):
    order = layers.split()
    for at, name in enumerate(order):
        tree = ast.parse((ROOT / "icl_lib" / f"{name.replace('.', '/')}.py").read_text())
        imports = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        used = {module.removeprefix("icl_lib.") for module in imports if module.startswith("icl_lib.")}
        assert used <= set(order[:at]), f"{name} imports {used - set(order[:at])}"


def readme_rows():
    """The modules of icl_lib that each row of the README's table names, in its order."""
    rows = re.findall(r"^\| (`(?:icl_lib|book|tests)/.*?) \|", README, re.MULTILINE)
    names = [re.findall(r"`(?:icl_lib/)?([\w/.]+)`", row) for row in rows if row.startswith("`icl_lib")]
    return [[name.removesuffix(".py").rstrip("/") for name in row] for row in names]


def test_the_readme_table_lists_every_module_in_the_order_of_imports():
    rows = readme_rows()
    listed = [name for row in rows for name in row]
    package = ROOT / "icl_lib"
    found = {path.stem for path in package.iterdir() if not path.name.startswith("__")}
    assert sorted(listed) == sorted(found)
    for at, row in enumerate(rows):
        known = {name for earlier in rows[: at + 1] for name in earlier}
        for name in row:
            for path in sorted((package / name).rglob("*.py")) or [package / f"{name}.py"] * (name != "static"):
                used = set(re.findall(r"^\s*(?:from|import) icl_lib\.(\w+)", path.read_text(), re.MULTILINE))
                assert used <= known, f"{path.name} imports {used - known}, which the README lists below {name}"


def test_every_module_has_its_place():
    found = {
        path.relative_to(ROOT / "icl_lib").with_suffix("").as_posix().replace("/", ".")
        for path in (ROOT / "icl_lib").rglob("*.py")
    }
    assert {name for name in found if not name.endswith("__init__")} == set(" ".join(LAYERS).split())
