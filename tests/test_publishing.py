"""What is published: the workflows do what they say, and an import of the library loads little beside torch."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
STEPS = {name: [step for job in flow["jobs"].values() for step in job["steps"]] for name, flow in WORKFLOWS.items()}


def test_there_are_three_workflows_and_each_step_is_pinned_or_a_command():
    assert WORKFLOWS.keys() == {"test", "pages", "wheels"}
    for steps in STEPS.values():
        for step in steps:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step.get("uses", "actions/checkout@v4"))


def test_what_the_workflows_run_exists():
    targets = re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    commands = [step["run"] for steps in STEPS.values() for step in steps if "run" in step]
    assert ".ci/run" in commands
    for command in commands:
        program, *arguments = command.split()
        if program.startswith(".ci/"):
            assert os.access(ROOT / program, os.X_OK), program
        elif program == "make":
            assert set(arguments) <= set(targets), command
        else:
            assert program == "pipx"


def test_the_wheel_is_installed_on_every_python_that_it_is_for():
    tested = WORKFLOWS["wheels"]["jobs"]["install"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text()
    assert tested == re.findall(r"Python :: (3\.\d+)\"", project)
    assert f'requires-python = ">={tested[0]}"' in project


@pytest.mark.slow
def test_an_import_of_the_library_loads_no_extra(tmp_path: Path):
    """`make bench` prints how long the import takes; what makes it long would be one of these."""
    heavy = ["IPython", "accelerate", "anywidget", "gguf", "ipywidgets", "joblib", "matplotlib", "peft", "tokenizers"]
    program = (
        f"import icl_lib, sys; print([name for name in {[*heavy, 'transformers', 'typer']} if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr
