"""How the book's notebooks run: with this checkout's library, from the cache if nothing has changed, and watched.

- Kernels import ``icl_lib`` from this checkout, installed or not.
- ``ICL_LIB_BOOK_BUILD=1`` tells the library's widgets to draw in advance what the page will show.
- Jupyter Book caches the outputs of a chapter until the chapter changes. The outputs also depend on the library, on
  the data and on the installed packages. Each state of these has its own cache. Comments and layout do not count.
- Chapters that are not in the cache run before the pages are read, as many at a time as there are cores, each on one.
- Each chapter notes how long it ran and how much memory it took.
- If a cell fails, its traceback is the last thing that the build prints.
"""

from __future__ import annotations

import ast
import atexit
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import ExecutionResult, single_nb_execution
from myst_nb.core.read import create_nb_reader
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
TOOK = "took.json"
"""The seconds and the memory that each page took when it ran, by page."""


def installed_versions(requirements: str) -> list[str]:
    """``name==version`` of each installed package among the lines of a requirements file.

    >>> installed_versions("# a comment\\n--extra-index-url somewhere\\nno-such-package>=1\\n")
    []
    """
    versions = []
    for line in requirements.splitlines():
        name = re.match(r"\s*([A-Za-z0-9][\w.-]*)", line)
        if name:
            try:
                versions.append(f"{name[1].lower()}=={metadata.version(name[1])}")
            except metadata.PackageNotFoundError:
                continue
    return sorted(versions)


def cache_key(folders: Iterable[Path], versions: Iterable[str] = ()) -> str:
    """A hash of ``versions`` and of the names and contents of all files in ``folders``, except compiled Python.

    Of a Python file only what runs counts. A docstring may be printed, so it counts too.
    """
    digest = hashlib.sha256("\n".join(versions).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            name, content = file.relative_to(folder).as_posix(), what_counts(file)
            digest.update(f"\0{folder.name}/{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def cache_folder(build: Path) -> Path:
    """The cache for this state of the library, the data and the packages, below the folder of the build."""
    requirements = ROOT / "requirements.txt"
    listed = requirements.read_text(encoding="utf-8") if requirements.exists() else ""
    versions = [f"python=={platform.python_version()}", *installed_versions(listed)]
    return build / ".jupyter_cache" / cache_key([ROOT / "icl_lib", ROOT / "book" / "data"], versions)


def what_counts(file: Path) -> bytes:
    """The contents of a file; of a Python file its syntax, without comments and layout."""
    content = file.read_bytes()
    try:
        return ast.dump(ast.parse(content)).encode() if file.suffix == ".py" else content
    except SyntaxError:
        return content


def use_this_checkout() -> None:
    """Let kernels import the library from this checkout."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(search))


def peak_memory(process: int) -> float:
    """The largest memory that a process has had so far, in MiB; on systems without /proc, what it has now."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        said = subprocess.run(["ps", "-o", "rss=", "-p", str(process)], capture_output=True, text=True, check=True)
        return int(said.stdout) / 2**10
    return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10


def watch_kernels(page: Callable[[], str], note: Callable[[str, dict[str, float]], Any]) -> None:
    """Watch each kernel that a notebook runs on; ``page()`` names the notebook that runs.

    At the end ``note(page, took)`` is called with its ``seconds`` and its ``peak_mib``. If a cell fails, its traceback
    is printed when this process ends.
    """
    run_cell, clean_up = NotebookClient.async_execute_cell, NotebookClient._async_cleanup_kernel
    begun: dict[int, float] = {}  # by the process of the kernel
    failed: set[str] = set()

    async def run_and_tell(client: NotebookClient, cell: Any, *args: Any, **kwargs: Any) -> Any:
        begun.setdefault(client.km.provisioner.pid, time.monotonic())
        try:
            return await run_cell(client, cell, *args, **kwargs)
        except CellExecutionError as error:
            if page() not in failed:
                failed.add(page())
                atexit.register(print, f"\n{page()}: a cell failed.\n{error.traceback}", file=sys.stderr)
            raise

    async def note_and_clean_up(client: NotebookClient) -> None:
        process = getattr(getattr(client.km, "provisioner", None), "pid", None)
        if process in begun:
            seconds = time.monotonic() - begun.pop(process)
            note(page(), {"seconds": round(seconds, 3), "peak_mib": round(peak_memory(process))})
        await clean_up(client)

    NotebookClient.async_execute_cell, NotebookClient._async_cleanup_kernel = run_and_tell, note_and_clean_up


def prepare(app: Any, config: Any) -> None:
    """Set the environment variables of the kernels, and choose the cache."""
    use_this_checkout()
    os.environ["ICL_LIB_BOOK_BUILD"] = "1"
    # A large array that is freed goes back to the system at once. Otherwise what a chapter takes depends on the order.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**20))
    if config.nb_execution_mode == "cache":
        config.nb_execution_cache_path = str(cache_folder(Path(app.outdir).parent))
        app.connect("env-before-read-docs", run_ahead)
    folder = Path(config.nb_execution_cache_path or Path(app.outdir).parent)
    watch_kernels(
        lambda: getattr(_running, "page", None) or app.env.docname, lambda *took: remember(folder / TOOK, *took)
    )
    app.connect("build-finished", lambda app, _: offer_measurements(folder / TOOK, Path(app.outdir).parent / TOOK))


def run_ahead(app: Any, env: Any, pages: list[str]) -> None:
    """Run the pages that the cache does not have, and put their outputs there.

    A page with a cell that fails is left out: it fails again, and is reported, when it is read.
    """
    cache, missing = get_cache(app.config.nb_execution_cache_path), {}
    for page in pages:
        file = Path(env.doc2path(page))
        text = file.read_text(encoding="utf-8")
        reader = create_nb_reader(str(file), env.myst_config, env.mystnb_config, text)
        notebook = reader and reader.read(text)
        if notebook and any(cell.cell_type == "code" for cell in notebook.cells):
            try:
                cache.match_cache_notebook(notebook)
            except KeyError:
                missing[page] = notebook
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    longest_first = sorted(missing, key=lambda page: -sum(len(cell.source) for cell in missing[page].cells))
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = threads or "1"
    with ThreadPoolExecutor(cores) as pool:
        runs = {pool.submit(run, page, missing[page], env): page for page in longest_first}
        for done in as_completed(runs):
            page, result = runs[done], done.result()
            if result.err is None:
                bundle = CacheBundleIn(missing[page], env.doc2path(page), data={"execution_seconds": result.time})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
                LOGGER.info("%s: executed in %.0f seconds", page, result.time)
    if threads is None:
        del os.environ["OMP_NUM_THREADS"]


_running = threading.local()
"""The page that runs in a thread."""
_one_at_a_time = threading.Lock()


def run(page: str, notebook: Any, env: Any) -> ExecutionResult:
    """Run one page in this thread; its outputs are in the notebook afterwards."""
    _running.page = page
    timeout = env.mystnb_config.execution_timeout
    return single_nb_execution(notebook, cwd=str(Path(env.doc2path(page)).parent), timeout=timeout, allow_errors=False)


def remember(file: Path, page: str, took: dict[str, float]) -> None:
    """Keep what a page took in a file beside the cache, so that a page from the cache keeps it."""
    with _one_at_a_time:
        known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**known, page: took}, indent=2), encoding="utf-8")


def offer_measurements(kept: Path, file: Path) -> None:
    """Copy what the pages of this state of the library took to a place that is the same for all states."""
    if kept.exists() and kept != file:
        shutil.copyfile(kept, file)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    sys.path.insert(0, str(ROOT))  # for autodoc
    app.connect("config-inited", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
