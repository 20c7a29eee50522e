"""An installed wheel works without the repository: its modules, its weights, its front end, its command, its extras."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions, requires
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import pytest
from conftest import ROOT
from setuptools.config.pyprojecttoml import load_file

import icl_lib

slow = pytest.mark.slow
PROJECT = load_file(ROOT / "pyproject.toml")
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


@slow
def test_the_wheel_holds_every_module_and_nothing_of_the_book_or_the_tests(wheel):
    package = ROOT / "icl_lib"
    data = [package / "py.typed", *package.glob("static/*"), *package.glob("paper/hidden_rule/hidden_rule.*")]
    assert len(data) == 12
    expected = {path.relative_to(ROOT).as_posix() for path in [*package.rglob("*.py"), *data]}
    with ZipFile(wheel[0]) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected


@slow
def test_an_installed_wheel_works(wheel, tmp_path):
    done = run(tmp_path, wheel[1])
    assert done.returncode == 0, done.stderr
    file, sizes, answer = done.stdout.splitlines()
    assert Path(file).is_relative_to(wheel[1])
    assert all(int(size) > 1000 for size in sizes.split())
    assert answer == "20"


@slow
def test_the_installed_command_runs(wheel, tmp_path):
    program = (
        f"import runpy, sys; sys.argv = ['icl-lib', '--version']; runpy.run_path({str(wheel[1] / 'bin/icl-lib')!r}"
    )
    done = run(tmp_path, wheel[1], program=f"{program}, run_name='__main__')")
    assert (done.returncode, done.stdout) == (0, f"icl_lib {icl_lib.__version__}\n"), done.stderr
    with ZipFile(wheel[0]) as archive:
        [metadata] = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    assert f"\nVersion: {icl_lib.__version__}\n" in metadata
    assert "\nClassifier: Typing :: Typed\n" in metadata


@slow
def test_without_the_wheel_there_is_nothing_to_import(tmp_path):
    assert "No module named 'icl_lib'" in run(tmp_path, program="import icl_lib").stderr


@slow
def test_a_wheel_without_the_weights_says_what_is_missing(tmp_path):
    entry = ', "paper/hidden_rule/hidden_rule.*"'
    _, folder = install(tmp_path, lambda text: text.replace(entry, ""))
    assert "ValueError: folder has no hidden_rule.safetensors" in run(tmp_path, folder).stderr


def test_the_version_is_the_one_to_cite():
    assert f"\nversion: {icl_lib.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def carried(extra: str = "") -> set[str]:
    """The packages that a plain install of this extra names, those of the extras that it includes among them."""
    lines = [*PROJECT["project"]["dependencies"]]
    if extra:
        lines += PROJECT["project"]["optional-dependencies"][extra]
    found = {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}
    if "icl-lib" in found:
        [inner] = [line for line in lines if line.startswith("icl_lib[")]
        found = (found - {"icl-lib"}).union(*map(carried, re.findall(r"[a-z]+", inner.removeprefix("icl_lib"))))
    return found


# These come with a package that is named, which promises them; a test reads that.
COME_WITH = {
    "cycler": "matplotlib",
    "pillow": "matplotlib",
    "traitlets": "ipywidgets",
    "ipython": "ipywidgets",
    "myst-nb": "jupyter-book",
    "sphinx": "jupyter-book",
    "sphinxcontrib-bibtex": "jupyter-book",
    "docutils": "sphinx",
    "pybtex": "sphinxcontrib-bibtex",
    "nbclient": "myst-nb",
    "nbformat": "myst-nb",
    "jupyter-cache": "myst-nb",
    "pyyaml": "myst-nb",
}


class Import(NamedTuple):
    """An import of a module, whether it waits for a call, and the extra that `with extra(...)` names around it."""

    module: str
    lazy: bool
    extra: str


def imports(node: ast.AST, lazy: bool = False, extra: str = "") -> Iterator[Import]:
    """All imports in a piece of source."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(name.name, lazy, extra) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield Import(child.module, lazy, extra)
            yield from (Import(f"{child.module}.{name.name}", lazy, extra) for name in child.names)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imports(child, True, extra)
        elif isinstance(child, ast.With) and (named := re.match(r"extra\('(\w+)'", ast.unparse(child.items[0]))):
            yield from imports(child, lazy, named[1])
        else:
            yield from imports(child, lazy, extra)


@functools.cache  # it takes a second
def BRINGS() -> dict[str, list[str]]:
    """The packages that bring each module. Python 3.10 itself knows only those of packages that list their modules."""
    brings = defaultdict(list, packages_distributions())
    for one in distributions():
        if one.read_text("top_level.txt") is None:
            for name in {file.parts[0].removesuffix(".py") for file in one.files or () if file.suffix == ".py"}:
                if one.name not in brings[name]:
                    brings[name].append(one.name)
    return brings


def package(module: str) -> str | None:
    """The package that brings a module; None for the standard library, and for what is no package at all."""
    top = module.partition(".")[0]
    found = BRINGS().get(top, [])
    return None if top in sys.stdlib_module_names or not found else found[0].lower().replace("_", "-")


@functools.cache
def imports_of(file: Path) -> tuple[Import, ...]:
    return tuple(imports(ast.parse(file.read_text())))


def file_of(module: str) -> Path | None:
    path = ROOT / module.replace(".", "/")
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def imported_with(module: str, seen: set[str]) -> Iterator[Import]:
    """Every import of another package that happens when a module of the library is imported."""
    parents = module.split(".")
    for name in (".".join(parents[:length]) for length in range(1, len(parents) + 1)):
        file = file_of(name)
        if name in seen or file is None:
            continue
        seen.add(name)
        for one in imports_of(file):
            if not one.lazy and one.module.startswith("icl_lib"):
                yield from imported_with(one.module, seen)
            elif not one.lazy:
                yield one


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "icl_lib").rglob("*.py"))
]
# The extra that each module needs at its import; the others work in a plain install.
EXTRA = {
    "icl_lib.cli": "llm",
    "icl_lib.paper.hidden_rule.__main__": "llm",
    "icl_lib.paper.compiling.__main__": "figures",
    "icl_lib.paper.experiments.__main__": "figures",
    "icl_lib.paper.figures": "figures",
    "icl_lib.paper.plots": "figures",
    "icl_lib.paper.tables": "widgets",
    "icl_lib.widgets": "widgets",
}
# The extra of the packages that these modules import in the bodies of functions.
EXTRA_INSIDE = {
    "icl_lib.cli": "llm",
    "icl_lib.paper.experiments.architectures": "llm",
    "icl_lib.paper.figures": "figures",
    "icl_lib.paper.hidden_rule": "llm",
}


def extra_of(module: str, table: dict[str, str]) -> str:
    return next((extra for name, extra in table.items() if f"{module}.".startswith(f"{name}.")), "")


def missing(found: set[str | None], extra: str) -> set[str]:
    """The packages of these that neither a plain install nor the extra brings."""
    have = carried() | carried(extra)
    for inner, outer in COME_WITH.items():
        have |= {inner} if outer in have else set()
    return found - {None} - have


@pytest.mark.parametrize("module", MODULES)
def test_an_extra_carries_what_its_modules_import(module):
    if module == "icl_lib.__main__":  # it is there to name the extra of the module that it imports
        return
    found = {package(one.module) for one in imported_with(module, set())}
    assert not missing(found, extra_of(module, EXTRA))
    for one in imports_of(file_of(module)):
        if one.lazy and not one.module.startswith("icl_lib"):
            assert not missing({package(one.module)}, one.extra or extra_of(module, EXTRA_INSIDE)), one


def test_every_extra_is_needed_where_it_is_named():
    for module in EXTRA:
        assert missing({package(one.module) for one in imported_with(module, set())}, ""), module
    for module in EXTRA_INSIDE:
        files = [name for name in MODULES if f"{name}.".startswith(f"{module}.")]
        lazy = {package(one.module) for name in files for one in imports_of(file_of(name))}
        assert missing(lazy, ""), module


def test_what_comes_with_a_package_is_promised_by_it():
    for inner, outer in COME_WITH.items():
        promised = {re.match(r"[\w.-]+", line)[0].lower() for line in requires(outer) if "extra ==" not in line}
        assert inner in promised, f"{outer} does not require {inner}"


def test_the_extra_of_the_book_carries_what_the_book_imports():
    cells = [
        cell
        for page in (ROOT / "book").glob("*.md")
        for cell in re.findall(r"^```{code-cell} ipython3\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(cells) > 100
    sources = [*cells, *(path.read_text() for path in (ROOT / "book" / "_ext").glob("*.py"))]
    own = {path.stem for path in (ROOT / "book" / "_ext").glob("*.py")} | {"icl_lib"}
    sources = [re.sub(r"\A---\n.*?^---\n|^:[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL) for text in sources]
    names = {one.module for text in sources for one in imports(ast.parse(text))}
    extensions = re.search(r"extra_extensions:\n((?:    - .*\n)+)", (ROOT / "_config.yml").read_text())[1]
    names |= set(re.findall(r"- (\S+)", extensions))
    found = {package(name) for name in names if name.partition(".")[0] not in own}
    assert {"sphinx-exercise", "sphinx-proof", "sphinxext-opengraph", "quickjs-ng", "numpy"} <= found
    assert not missing(found, "book")
    assert missing(found, "widgets") > {"sphinx-exercise"}  # negative control
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    assert pinned <= carried("dev") | {"icl-lib"}, "requirements.txt pins what no extra names"


BLOCK = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def without(names: list[str], program: str) -> subprocess.CompletedProcess[str]:
    """Run a program to which these packages are not installed."""
    command = [sys.executable, "-c", BLOCK.format(names=names) + program]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@slow
@pytest.mark.parametrize(
    ("module", "arguments", "name", "extra"),
    [
        ("icl_lib", "--help", "typer", "llm"),
        ("icl_lib", "verify --model . --prompt a --query b", "transformers", "llm"),
        ("icl_lib.paper.experiments", "--help", "typer", "figures"),
        ("icl_lib.paper.experiments", "--help", "joblib", "figures"),
        ("icl_lib.paper.hidden_rule", "--help", "typer", "llm"),
        ("icl_lib.paper.hidden_rule", "--quick", "transformers", "llm"),
    ],
)
def test_a_command_names_the_extra_that_is_missing(module, arguments, name, extra):
    start = f"import runpy; sys.argv = ['', *{arguments.split()}]; runpy.run_module({module!r}, run_name='__main__')"
    done = without([name], start)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {name} is missing: pip install 'icl_lib[{extra}]'.\n"


@slow
@pytest.mark.parametrize(
    ("program", "name", "extra"),
    [
        ("from icl_lib import explore", "ipywidgets", "widgets"),
        ("from icl_lib import Playground", "anywidget", "widgets"),
        ("from icl_lib import Playground", "matplotlib", "widgets"),
        ("import icl_lib.paper.figures", "matplotlib", "figures"),
        ("import icl_lib.paper.plots", "matplotlib", "figures"),
    ],
)
def test_an_import_names_the_extra_that_is_missing(program, name, extra):
    last = without([name], program).stderr.splitlines()[-1]
    assert last == f"ModuleNotFoundError: {name} is missing: pip install 'icl_lib[{extra}]'."


@slow
def test_a_plain_install_offers_all_names():
    extras = sorted(
        {
            module
            for module, names in BRINGS().items()
            for name in names
            if name.lower().replace("_", "-") in (carried("dev") | {"cycler", "traitlets"}) - carried()
        }
    )
    program = "from icl_lib import *\nprint(implicit_update.__name__, __import__('icl_lib').__version__)\n"
    done = without(extras, program)
    assert (done.stdout, done.stderr) == (f"implicit_update {icl_lib.__version__}\n", "")
    assert "icl_lib[widgets]" in without(extras, "from icl_lib import explore").stderr  # control: they are blocked
