"""A function run over many settings: in parallel, resumable, and nothing that was finished is lost."""

from __future__ import annotations

import hashlib
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
"""How long a Dask scheduler may take to answer."""

# The number of threads and the global random generator belong to the process, and a Dask worker may have several
# threads: runs in one process take turns. Reentrant, for a run that sweeps itself.
_TURN = threading.RLock()


class Checkpoint:
    """The state of an unfinished run in the file ``path``, so that the run can continue where it was.

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
        """The last saved state, its tensors on the CPU, or None; `ValueError` for a file that is something else."""
        if not self.path.exists():
            return None
        try:
            saved = _unpack(self.path.read_bytes())
            mine = saved.keys() == {"name", "state"} and saved["name"] == self.path.name
        except Exception:  # what a damaged file raises depends on where the damage is
            mine = False
        if not mine:
            raise ValueError(f"{self.path} is not a checkpoint of this run: delete it, and the run starts anew.")
        return saved["state"]

    def save(self, state: dict) -> None:
        """Replace the saved state at once: tensors, state dicts, numbers, strings, and lists and dicts of these."""
        content = io.BytesIO()
        torch.save({"name": self.path.name, "state": state}, content)
        try:
            _unpack(content.getvalue())  # rather an error now than a state that proves unreadable when it is needed
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"state does not load again: give tensors, numbers, strings, lists, dicts. {error}"
            ) from error
        _write(self.path, content.getvalue())

    def clear(self) -> None:
        """Remove the saved state, if there is one."""
        self.path.unlink(missing_ok=True)


def _unpack(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _write(path: Path, content: bytes) -> None:
    """Replace a file as a whole: a process killed at any moment leaves the old one or the new one."""
    # Each process has its own name for this: a worker whose parent was killed may still be at work on the same run.
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
        fields = json.loads(json.dumps(asdict(self.settings)))  # as they read from disk, where tuples are lists
        return {"run": f"{self.run.__module__}.{self.run.__qualname__}", "settings": fields}

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
        if not owned or record.keys() != {"run", "settings", "versions", "result"}:
            raise ValueError(f"{self.path()} is not the record of {self.settings}: delete it, and it is computed anew.")
        return record


def _checkpoint(record: Path) -> Checkpoint:
    return Checkpoint(record.with_suffix(".partial.pt"))


def _execute(job: _Job, resumable: bool) -> tuple[_Job, dict | None, Exception | None, str]:
    """The job with its record, or with its exception and traceback: raised here, it would end the other runs too."""
    with _TURN:
        threads = torch.get_num_threads()
        # How a sum is split among threads decides how it is rounded: with one thread, results depend neither on the
        # number of cores nor on how many workers share them.
        torch.set_num_threads(1)
        try:
            result = job.run(job.settings, _checkpoint(job.path()) if resumable else None)
            if not isinstance(result, dict):
                raise TypeError(f"{job.run.__name__} returned a {type(result).__name__}: return a dict for JSON.")
            versions = {"icl_lib": version("icl_lib"), "torch": torch.__version__, "python": platform.python_version()}
            return job, json.loads(json.dumps({**job.identity(), "versions": versions, "result": result})), None, ""
        except Exception as error:
            trace = traceback.format_exc()  # an exception that goes to another process leaves its traceback behind
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # and some cannot go there at all
                error = RuntimeError(repr(error))
            return job, None, error, trace
        finally:
            torch.set_num_threads(threads)


def _locally(jobs: list[_Job], workers: int | None) -> Iterator[tuple]:
    import joblib

    count = min(workers or joblib.cpu_count(), len(jobs))
    # Runs batched together would be handed back, and written, only after the last of them.
    parallel = joblib.Parallel(count, backend="loky", batch_size=1, return_as="generator_unordered")
    try:
        yield from parallel(joblib.delayed(_execute)(job, True) for job in jobs)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process was killed, most often for lack of memory. Finished runs are on disk: run again to "
            "continue, with fewer workers."
        ) from error


def _on_cluster(jobs: list[_Job], address: str) -> Iterator[tuple]:
    from dask.distributed import Client, as_completed

    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"no Dask scheduler answers at dask={address!r} within {CONNECT_SECONDS} s: start one (`dask scheduler`)."
        ) from error
    with client:
        futures = {client.submit(_execute, job, False, pure=False): job for job in jobs}
        for future in as_completed(futures, loop=client.loop):
            try:
                yield future.result()
            except Exception as error:  # no run's own: its workers were killed again and again, or the scheduler left
                yield futures[future], None, error, ""


def _check(run: Any, settings: Any, folder: Any, workers: Any = None, dask: Any = None, progress: bool = True) -> None:
    if not callable(run) or "<" in getattr(run, "__qualname__", "<"):
        raise ValueError(f"run is {run!r}: give a function defined at the top of a module, where workers find it.")
    if isinstance(settings, str) or not isinstance(settings, Sequence) or not settings:
        raise ValueError(f"settings is {settings!r}: give a list of at least one frozen dataclass instance.")
    seen: dict[Path, int] = {}
    for index, one in enumerate(settings):
        if not getattr(getattr(type(one), "__dataclass_params__", None), "frozen", False):
            raise ValueError(f"settings[{index}] is {one!r}: give an instance of a @dataclass(frozen=True).")
        try:
            same = seen.setdefault(_Job(run, one, Path()).path(), index)
        except TypeError as error:
            raise ValueError(f"settings[{index}] is {one!r}: keep its fields to what JSON holds. {error}") from error
        if same != index:
            raise ValueError(f"settings[{index}] has the same fields as settings[{same}], {one}: leave one out.")
    place = next(place for place in (Path(folder).resolve(), *Path(folder).resolve().parents) if place.exists())
    if not place.is_dir():
        raise ValueError(f"folder is {str(folder)!r} but {str(place)!r} is a file: give a folder, which may be new.")
    if workers is not None:
        require_size("workers", workers)
        if dask is not None:
            raise ValueError(f"workers is {workers}, but workers at dask={dask!r} are started there: leave one out.")
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
    """Run a function over settings; each record is in its file as soon as its run is done, and is never run again.

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
        run: called as ``run(settings, checkpoint)`` with one PyTorch thread; gives a dict for JSON. It takes its seed
            from ``settings`` and may keep a long run's state in ``checkpoint``, a :class:`Checkpoint` or None.
        settings: instances of frozen dataclasses, no two with the same fields.
        folder: of the records, ``<function>-<hash of function and fields>.json``, and of the checkpoints beside them.
            Two sweeps at once may share it unless they share settings.
        workers: processes on this machine, one per core unless given; 1 stays in this process.
        dask: address of a Dask scheduler, whose workers need this library and ``run``'s module, but not ``folder``.
            Their disks are not this one: ``checkpoint`` is None, and a run whose worker is lost starts again elsewhere.
            Runs in one worker process take turns: start workers with ``--nthreads 1``.
        progress: show a progress bar (never while the book is built).

    Returns the records in the order of ``settings``: dicts of ``run``, ``settings``, ``versions`` and ``result``.

    Raises `ValueError` for a file that is not the record of its settings, which is never overwritten; `ConnectionError`
    without a scheduler; and `RuntimeError` naming the settings of a run that failed, once all others are done.

    Dask is given the runs by its own client. Joblib's backend for it (1.6.0) waits forever for a run that kills its
    workers again and again, and on a cluster of one core runs everything in the calling process instead.
    """
    jobs = [_Job(run, one, Path(folder).resolve()) for one in settings]
    jobs[0].folder.mkdir(parents=True, exist_ok=True)
    records = {job.path(): record for job in jobs if (record := job.read()) is not None}
    missing = [job for job in jobs if job.path() not in records]
    # What a killed process may have left: half a file, and the checkpoint of a run whose record was written.
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
            f"The others are in {job.folder}: running again continues with what is missing.\n{trace}"
        ) from error
    return [records[job.path()] for job in jobs]
