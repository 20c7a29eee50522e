"""An installed wheel works without the repository: its modules, its weights, its front end."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
OFFLINE = ["--no-index", "--no-deps"]
PROGRAM = """
import icl_lib
from icl_lib.paper.hidden_rule import VOCABULARY, load_hidden_rule, replies
from icl_lib.widgets import Playground
print(icl_lib.__file__)
print(len(Playground()._esm), len(Playground()._css))
print(VOCABULARY.decode(replies(load_hidden_rule(), VOCABULARY.encode("2+3=10, 4+2=12, 1+5=12, 2+8=")[None])))
"""


def install(folder: Path, change=lambda text: text) -> tuple[Path, Path]:
    """Build a wheel of the project, with its ``pyproject.toml`` changed, and unpack it; gives the wheel and where."""
    ignored = shutil.ignore_patterns("_build", ".*", "__pycache__", "*.egg-info")
    project = Path(shutil.copytree(ROOT, folder / "project", ignore=ignored))
    (project / "pyproject.toml").write_text(change((ROOT / "pyproject.toml").read_text()))
    build = [*PIP, "wheel", *OFFLINE, "--no-build-isolation", "--wheel-dir", str(folder), str(project)]
    subprocess.run(build, check=True, cwd=folder)
    [wheel] = folder.glob("*.whl")
    subprocess.run([*PIP, "install", *OFFLINE, "--target", str(folder / "installed"), str(wheel)], check=True)
    return wheel, folder / "installed"


def run(folder: Path, *first: Path, program: str = PROGRAM) -> subprocess.CompletedProcess[str]:
    """Run a program that can import from these folders and the installed packages, but not from the repository."""
    paths = [*first, sysconfig.get_path("purelib")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    # -S: the file that makes the repository importable is in the folder of the packages, and is not read.
    command = [sys.executable, "-S", "-c", program]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return install(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_every_module_and_nothing_of_the_book_or_the_tests(wheel):
    package = ROOT / "icl_lib"
    data = [*package.glob("static/*"), *package.glob("paper/hidden_rule/hidden_rule.*")]
    assert len(data) == 6
    expected = {path.relative_to(ROOT).as_posix() for path in [*package.rglob("*.py"), *data]}
    with ZipFile(wheel[0]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_an_installed_wheel_works(wheel, tmp_path):
    done = run(tmp_path, wheel[1])
    assert done.returncode == 0, done.stderr
    file, sizes, answer = done.stdout.splitlines()
    assert Path(file).is_relative_to(wheel[1])
    assert all(int(size) > 1000 for size in sizes.split())
    assert answer == "20"


def test_without_the_wheel_there_is_nothing_to_import(tmp_path):
    assert "No module named 'icl_lib'" in run(tmp_path, program="import icl_lib").stderr


def test_a_wheel_without_the_weights_says_what_is_missing(tmp_path):
    entry = ', "paper/hidden_rule/hidden_rule.*"'
    _, folder = install(tmp_path, lambda text: text.replace(entry, ""))
    assert "ValueError: folder has no hidden_rule.safetensors" in run(tmp_path, folder).stderr
