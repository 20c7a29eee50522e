"""Run a function over many settings in parallel, resume stopped runs, and keep every finished one."""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import pickle
import platform
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.validation import require_size, validated_by

CONNECT_SECONDS = 10
"""Seconds to wait for a Dask scheduler."""

# The number of threads and the global random generator belong to the process, and a Dask worker may have several
# threads: runs in one process take turns. Reentrant, for a run that sweeps itself.
_TURN = threading.RLock()


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
            saved = _unpack(self.path.read_bytes())
            mine = saved.keys() == {"name", "state"} and saved["name"] == self.path.name
        except Exception:  # which exception a damaged file raises depends on the damage
            mine = False
        if not mine:
            raise ValueError(f"{self.path} is not a checkpoint of this run: delete it to start the run again.")
        return saved["state"]

    def save(self, state: dict) -> None:
        """Replace the saved state: tensors, state dicts, numbers, strings, and lists and dicts of these."""
        content = io.BytesIO()
        torch.save({"name": self.path.name, "state": state}, content)
        try:
            _unpack(content.getvalue())  # fail now, not when the state is needed
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"state cannot be loaded again: give tensors, numbers, strings, lists and dicts. {error}"
            ) from error
        _write(self.path, content.getvalue())

    def clear(self) -> None:
        """Delete the saved state, if there is one."""
        self.path.unlink(missing_ok=True)


def _unpack(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _write(path: Path, content: bytes) -> None:
    """Replace a file atomically: a process killed at any moment leaves either the old file or the new one."""
    # The name contains the process id, since a worker whose parent was killed may still work on the same run.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@dataclass(frozen=True)
class _Job:
    run: Callable[..., dict]
    settings: Any
    folder: Path

    def identity(self) -> dict:
        fields = json.loads(json.dumps(asdict(self.settings)))  # as read from disk, where tuples are lists
        return {"run": f"{self.run.__module__}.{self.run.__qualname__}", "code": _code(self.run), "settings": fields}

    def path(self) -> Path:
        digest = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{self.run.__name__}-{digest[:12]}.json"

    def read(self) -> dict | None:
        if not self.path().exists():
            return None
        try:
            record = json.loads(self.path().read_bytes())
            owned = json.dumps({**record, **self.identity()}, sort_keys=True) == json.dumps(record, sort_keys=True)
        except (ValueError, TypeError):
            owned = False
        if not owned or record.keys() != {"run", "code", "settings", "versions", "result"}:
            raise ValueError(
                f"{self.path()} is not the record of {self.settings}: delete it to run these settings again."
            )
        return record


def _code(run: Callable[..., dict]) -> str:
    """Return a digest of the function's source: another function of the same name is another run, an edited one too."""
    try:
        source = inspect.getsource(run)
    except (OSError, TypeError):  # typed into an interpreter, or compiled
        source = repr((run.__code__.co_code, run.__code__.co_consts)) if hasattr(run, "__code__") else run.__qualname__
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _checkpoint(record: Path) -> Checkpoint:
    return Checkpoint(record.with_suffix(".partial.pt"))


def _execute(job: _Job, resumable: bool) -> tuple[_Job, dict | None, Exception | None, str]:
    """Return the job with its record, or with its exception: an exception raised here would end the other runs too."""
    with _TURN:
        threads = torch.get_num_threads()
        # Rounding depends on how a sum is split among threads. With one thread, results depend neither on the number of
        # cores nor on the number of workers.
        torch.set_num_threads(1)
        try:
            result = job.run(job.settings, _checkpoint(job.path()) if resumable else None)
            if not isinstance(result, dict):
                raise TypeError(
                    f"{job.run.__name__} returned a {type(result).__name__}: return a dict that JSON can hold."
                )
            versions = {"icl_lib": version("icl_lib"), "torch": torch.__version__, "python": platform.python_version()}
            return job, json.loads(json.dumps({**job.identity(), "versions": versions, "result": result})), None, ""
        except Exception as error:
            trace = traceback.format_exc()  # pickled exceptions lose their traceback
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # and some exceptions cannot be pickled
                error = RuntimeError(repr(error))
            return job, None, error, trace
        finally:
            torch.set_num_threads(threads)


def _locally(jobs: list[_Job], workers: int | None) -> Iterator[tuple]:
    import joblib

    count = min(workers or joblib.cpu_count(), len(jobs))
    # Runs in one batch would be returned, and written, only after the last of them.
    parallel = joblib.Parallel(count, backend="loky", batch_size=1, return_as="generator_unordered")
    try:
        yield from parallel(joblib.delayed(_execute)(job, True) for job in jobs)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, often for lack of memory: run again with fewer workers. Finished runs are on "
            "disk and are not repeated."
        ) from error


def _on_cluster(jobs: list[_Job], address: str) -> Iterator[tuple]:
    from dask.distributed import Client, as_completed

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler at dask={address!r} within {CONNECT_SECONDS} s: start one (`dask scheduler`)."
        ) from error
    with client:
        futures = {client.submit(_execute, job, False, pure=False): job for job in jobs}
        for future in as_completed(futures, loop=client.loop):
            try:
                yield future.result()
            except Exception as error:  # not raised by the run: its workers were killed, or the scheduler left
                yield futures[future], None, error, ""


def _check(run: Any, settings: Any, folder: Any, workers: Any = None, dask: Any = None, progress: bool = True) -> None:
    if not callable(run) or "<" in getattr(run, "__qualname__", "<"):
        raise ValueError(f"run is {run!r}: give a function at the top level of a module, where workers can import it.")
    if isinstance(settings, str) or not isinstance(settings, Sequence) or not settings:
        raise ValueError(f"settings is {settings!r}: give a list of at least one frozen dataclass instance.")
    seen: dict[Path, int] = {}
    for index, one in enumerate(settings):
        if not getattr(getattr(type(one), "__dataclass_params__", None), "frozen", False):
            raise ValueError(f"settings[{index}] is {one!r}: give an instance of a @dataclass(frozen=True).")
        try:
            same = seen.setdefault(_Job(run, one, Path()).path(), index)
        except TypeError as error:
            raise ValueError(f"settings[{index}] is {one!r}: use fields that JSON can hold. {error}") from error
        if same != index:
            raise ValueError(f"settings[{index}] has the same fields as settings[{same}], {one}: remove one of them.")
    place = next(place for place in (Path(folder).resolve(), *Path(folder).resolve().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"folder is {str(folder)!r}, but {str(place)!r} is a file: give a new or existing folder.")
    if workers is not None:
        require_size("workers", workers)
        if dask is not None:
            raise ValueError(f"workers is {workers} and dask is {dask!r}, which has its own workers: give only one.")
    package, extra = ("joblib", "figures") if dask is None else ("distributed", "cluster")
    try:
        import_module(package)
    except ImportError as error:
        raise ImportError(f"{package} is not installed: pip install 'icl_lib[{extra}]'.") from error


@validated_by(_check)
def sweep(
    run: Callable[..., dict],
    settings: Sequence[Any],
    folder: str | Path,
    workers: int | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> list[dict]:
    """Run a function over many settings; each record is written when its run is done, and is not computed again.

    >>> import tempfile
    >>> @dataclass(frozen=True)
    ... class Power:
    ...     base: int
    ...     exponent: int = 2
    >>> def power(settings, checkpoint=None):
    ...     return {"value": settings.base**settings.exponent}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     records = sweep(power, [Power(2), Power(3)], folder, workers=1, progress=False)
    >>> [record["result"] for record in records], records[1]["settings"]
    ([{'value': 4}, {'value': 9}], {'base': 3, 'exponent': 2})

    Args:
        run: called as ``run(settings, checkpoint)`` with one PyTorch thread; returns a dict that JSON can hold. It
            takes its seed from ``settings``. It may save the state of a long run in ``checkpoint``, a
            :class:`Checkpoint` or None.
        settings: instances of frozen dataclasses, no two with the same fields.
        folder: the folder of the records, ``<function>-<hash of function and fields>.json``, and of the checkpoints.
            The hash covers the function's own source, but not what the function calls.
            Two sweeps may use it at the same time if they have no settings in common.
        workers: number of processes on this machine, by default one per core; 1 runs in this process.
        dask: address of a Dask scheduler, whose workers need this library and ``run``'s module, but not ``folder``.
            They have other disks, so ``checkpoint`` is None, and a run whose worker is lost starts again elsewhere.
            Runs in one worker process take turns, so start workers with ``--nthreads 1``.
        progress: show a progress bar (never while the book is built).

    Returns the records in the order of ``settings``: dicts of ``run``, ``code``, ``settings``, ``versions`` and
    ``result``.

    Raises `ValueError` for a file that is not the record of its settings, and does not overwrite it. Raises
    `ConnectionError` without a scheduler. If runs fail, raises `RuntimeError` with the settings of the first after all
    others are done.

    Runs go to Dask through its own client. Joblib's backend for Dask (1.6.0) waits forever for a run that repeatedly
    kills its workers, and on a cluster of one core it runs everything in the calling process.
    """
    jobs = [_Job(run, one, Path(folder).resolve()) for one in settings]
    jobs[0].folder.mkdir(parents=True, exist_ok=True)
    records = {job.path(): record for job in jobs if (record := job.read()) is not None}
    missing = [job for job in jobs if job.path() not in records]
    # A killed process may have left a partial file, and the checkpoint of a run whose record was written.
    for half in jobs[0].folder.glob("*.tmp"):
        if half.name.split(".")[0] in {job.path().stem for job in jobs}:
            half.unlink(missing_ok=True)
    for path in records:
        _checkpoint(path).clear()
    outcomes, failed = iter(()), []
    if missing:
        outcomes = _locally(missing, workers) if dask is None else _on_cluster(missing, dask)
    hidden = not progress or building_book()
    with tqdm(total=len(jobs), initial=len(records), desc=run.__name__, unit="run", disable=hidden) as bar:
        for job, record, error, trace in outcomes:
            if error is None:
                records[job.path()] = record
                _write(job.path(), json.dumps(record, indent=1).encode() + b"\n")
                _checkpoint(job.path()).clear()
            else:
                failed.append((job, error, trace))
                bar.set_postfix(failed=len(failed))
            bar.update()
    if failed:
        job, error, trace = failed[0]
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} runs failed, first with {job.settings}: {type(error).__name__}: {error}\n"
            f"The other records are in {job.folder}: run again to compute only the missing ones.\n{trace}"
        ) from error
    return [records[job.path()] for job in jobs]
