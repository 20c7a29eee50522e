"""Each example of the README and of the library's pages runs by itself, and each command of the README runs."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from icl_lib.measures import at_most

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


API = ["book/api.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "book" / "api").glob("*.md")))]
EXAMPLES = [(page, code) for page in ("README.md", *API) for code in blocks(page, "python")]
COMMANDS = [line for code in blocks("README.md", "sh") for line in code.splitlines()]


def test_all_blocks_are_examples_or_commands():
    opened = re.findall(r"^```(.*)$", README, re.MULTILINE)
    assert set(opened) == {"python", "sh", ""}
    assert opened.count("") == opened.count("python") + opened.count("sh")
    assert len(EXAMPLES) >= 5
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[f"{page}-{at}" for at, (page, _) in enumerate(EXAMPLES)])
def test_an_example_runs_by_itself(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "assert" in code
    exec(compile(code, page, "exec"), {"__name__": "__main__"})


def test_an_example_without_its_imports_does_not_run():
    """Negative control: nothing of an earlier example is left over."""
    with pytest.raises(NameError, match="torch"):
        exec(EXAMPLES[0][1].replace("import torch\n", ""), {})


@pytest.mark.slow
def test_the_commands_run_in_order(tmp_path):

    def run(arguments):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    outputs, ran = [], []
    for command in COMMANDS:
        program, *arguments = shlex.split(command)
        if program == "make":  # these take minutes; the tests and the build of the book run them
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
            continue
        assert program == "python", command
        done = run(arguments)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        outputs.append(done.stdout)
        ran.append(arguments)
    assert any("The identity holds" in output for output in outputs)
    assert (tmp_path / "_build/puzzle-as-adapter/adapter_config.json").is_file()
    for arguments, says in ((ran[0], "--export is"), (ran[-1], "--overwrite")):  # a second time nothing is replaced
        again = run(arguments)
        assert (again.returncode, says in again.stderr) == (2, True)


def test_the_page_can_be_read_where_the_repository_is_not():
    """On a package index a relative link leads nowhere; the picture shows its text there."""
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", README)
    assert all(len(text) > 40 for text, _ in pictures)
    assert all((ROOT / path).stat().st_size < 200_000 for _, path in pictures)
    links = re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", README)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_every_extra_is_explained():
    project = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    for extra in set(re.findall(r"^(\w+) = ", project, re.MULTILINE)) - {"dev"}:
        assert f"`'.[{extra}]'`" in README, extra


def stored(name):
    return json.loads((ROOT / "book" / "data" / f"{name}.json").read_text())


def test_the_numbers_of_the_table_are_those_that_are_stored():
    """Each row from the data: bounds are rounded up, and what they must be told from down."""
    known = {name: one["value"] for name, one in stored("known-model")["results"].items()}
    rows = []
    for name in ("in_64_bits", "identity", "in_16_bits"):
        error, bare = (
            choose(one[key] for one in known[name].values()) for choose, key in ((max, "error"), (min, "bare"))
        )
        rows.append(("–", f"≤ {at_most(error)}", f"≥ {math.floor(100 * bare) / 100}"))
    adapter = known["adapter"]
    rows.append(("–", f"≤ {at_most(adapter['error'])}", f"≥ {math.floor(100 * adapter['bare']) / 100}"))
    assert f"adapter of {adapter['kilobytes'] / 1000:.1f} MB" in README
    verbs = stored("past-tense")["results"]["past_tense"]["value"]
    assert f"the past tense of {len(verbs['questions'])} others" in README
    rows.append(tuple(f"{verbs['right'][name]:.0%}" for name in ("prompted", "edited", "bare")))
    compiling = stored("compiling")
    asked = {**compiling["defaults"], "task": None, "seed": None}  # the runs stand for all tasks and seeds
    few = {}
    for run in compiling["runs"]:
        same = all(asked[name] == value for name, value in run["settings"].items() if name != "method")
        if run["kind"] == "few-shot" and same:
            few[run["settings"]["method"]] = run["accuracy"][0]
            prompted = run["prompted"][0]
    rows.append(tuple(f"{value:.0%}" for value in (prompted, few["compiled"], few["bare"])))
    (shape,) = stored("cost_language")["shapes"]
    rows.append(("–", f"{shape['ratios']['last token / forward'][1]:.1f}", "–"))
    shown = re.findall(r"^\| [^|`]+ \| ([^|`]+) \| ([^|`]+) \| ([^|`]+) \|$", README, re.MULTILINE)
    spaces = str.maketrans({"\N{NO-BREAK SPACE}": " "})
    assert shown[1:] == [tuple(text.translate(spaces) for text in row) for row in rows]
