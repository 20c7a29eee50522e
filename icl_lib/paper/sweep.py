"""Run a function over many settings in parallel, continue after an interruption, and keep every finished run."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from icl_lib.environment import extra


class Checkpoint:
    """The file ``path`` with the state of an unfinished run, from which the run can continue.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     checkpoint = Checkpoint(f"{folder}/training.pt")
    ...     before = checkpoint.load()
    ...     checkpoint.save({"step": 3, "weight": torch.ones(2)})
    ...     before, checkpoint.load()
    (None, {'step': 3, 'weight': tensor([1., 1.])})
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def load(self) -> dict | None:
        """Return the last saved state, its tensors on the CPU, or None; raise `ValueError` for any other file."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, map_location="cpu", weights_only=True)["state"]
        except Exception as error:  # which exception a damaged file raises depends on the damage
            raise ValueError(f"{self.path} is not a checkpoint: delete it to start the run again.") from error

    def save(self, state: dict) -> None:
        """Replace the saved state: tensors, numbers, strings, and lists and dicts of these; others raise an error."""
        with _replacing(self.path) as temporary:
            torch.save({"state": state}, temporary)
            torch.load(temporary, weights_only=True)  # a state that cannot be loaded fails now, not when it is needed


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a file to write, which then replaces ``path`` at once: a process killed at any moment spoils nothing."""
    # The name contains the process id, since a worker whose parent was killed may still work on the same run.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _made_by(run: Callable[..., dict]) -> dict[str, Any]:
    """Return what a result depends on besides its settings; ``code`` is a digest of run's module and this library."""
    file = getattr(sys.modules.get(getattr(run, "__module__", "")), "__file__", None)
    if file is None or "<" in getattr(run, "__qualname__", "<"):
        raise ValueError(f"run is {run!r}: write a function at the top level of a file, from which workers import it.")
    sources = [Path(file), *sorted(Path(__file__).resolve().parents[1].rglob("*.py"))]
    return {
        "run": f"{run.__module__}.{run.__qualname__}",
        "code": hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12],
        "versions": {"icl_lib": version("icl_lib"), "torch": torch.__version__, "python": sys.version.split()[0]},
    }


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text())


def _execute(run: Callable[..., dict], settings: Any, path: Path, made_by: dict[str, Any]) -> str:
    """Write the record of a run; return what went wrong, since an exception would end the other runs too."""
    threads, checkpoint = torch.get_num_threads(), Checkpoint(path.with_suffix(".partial.pt"))
    torch.set_num_threads(1)  # how a sum is rounded depends on how it is split among threads
    try:
        record = {**made_by, "settings": asdict(settings), "result": dict(run(settings, checkpoint))}
        with _replacing(path) as temporary:
            temporary.write_text(f"{json.dumps(record, indent=1)}\n")
        checkpoint.path.unlink(missing_ok=True)
    except Exception:
        return traceback.format_exc()
    finally:
        torch.set_num_threads(threads)
    return ""


def sweep(
    run: Callable[..., dict],
    settings: Sequence[Any],
    folder: str | Path,
    workers: int | None = None,
    progress: bool = True,
) -> list[dict]:
    """Run a function over many settings; each record is written when its run is done, and is not computed again.

    >>> import tempfile
    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Number:
    ...     value: int
    >>> def square(settings, checkpoint):
    ...     return {"square": settings.value**2}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records = sweep(square, [Number(2), Number(3)], folder, workers=1, progress=False)
    >>> [record["result"] for record in records], records[1]["settings"]
    ([{'square': 4}, {'square': 9}], {'value': 3})

    Args:
        run: called as ``run(settings, checkpoint)`` with one PyTorch thread; returns a dict that JSON can hold. It
            takes its seed from ``settings``, and may save the state of a long run in ``checkpoint``.
        settings: instances of dataclasses.
        folder: the folder of the records, ``<function>-<hash>.json``, and of the checkpoints. The hash covers the
            settings, the source of the function's module and of this library, and the versions of icl_lib, PyTorch and
            Python: after a change of any of these, the run is computed again.
        workers: number of processes, by default one per core; 1 runs in this process.
        progress: show a progress bar.

    Returns the records in the order of ``settings``: dicts of ``run``, ``code``, ``versions``, ``settings`` and
    ``result``. Raises `RuntimeError` if runs fail, with the settings of the first, after all others are done.
    """
    with extra("figures"):
        import joblib  # a checkpoint alone does not need it

    made_by, paths = _made_by(run), []
    for index, one in enumerate(settings):
        try:
            key = json.dumps({**made_by, "settings": asdict(one)}).encode()
        except TypeError as error:
            raise ValueError(f"settings[{index}] is {one!r}: give a dataclass whose fields JSON can hold.") from error
        paths.append(Path(folder).resolve() / f"{run.__name__}-{hashlib.sha256(key).hexdigest()[:12]}.json")
    Path(folder).mkdir(parents=True, exist_ok=True)
    missing = {path: one for path, one in zip(paths, settings, strict=True) if _read(path) is None}
    parallel = joblib.Parallel(-1 if workers is None else workers, return_as="generator")
    traces = parallel(joblib.delayed(_execute)(run, one, path, made_by) for path, one in missing.items())
    bar = tqdm(traces, run.__name__, total=len(missing), disable=not progress)
    failed = [f"{one}.\n{trace}" for one, trace in zip(missing.values(), bar, strict=True) if trace]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(missing)} runs failed, first with {failed[0]}")
    return [json.loads(path.read_text()) for path in paths]
