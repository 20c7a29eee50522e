"""Sweeps: nothing that was finished is lost, whatever is killed."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import sweep_runs
import torch
from sweep_runs import Inner, Task, until

from icl_lib.paper import sweep as module
from icl_lib.paper.sweep import Checkpoint, sweep

TESTS = Path(__file__).resolve().parent


@pytest.fixture
def log(tmp_path):
    file = tmp_path / "log"
    file.touch()
    return file


def tasks(log, count=4, pause=0.0):
    return [Task(number, str(log), pause) for number in range(count)]


def starts(log):
    """How often the run with each number was started."""
    return Counter(int(line.split()[0]) for line in log.read_text().splitlines())


def kill_in_the_middle(happened, *arguments, kill=os.killpg):
    """Run a sweep in a process group of its own and kill all of it, without warning, once something has happened.

    With ``os.kill`` only the parent dies, and the group, whose number is returned, goes on.
    """
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    command = [sys.executable, "-c", "import sweep_runs; sweep_runs.main()", *map(str, arguments)]
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        until(lambda: happened() or process.poll() is not None)
    finally:
        kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    return process.pid


@pytest.mark.parametrize("workers", [1, 2])
def test_records_come_in_order_and_are_on_disk(tmp_path, log, workers):
    records = sweep(sweep_runs.square, list(reversed(tasks(log))), tmp_path / "new" / "folder", workers=workers)
    assert [record["result"]["square"] for record in records] == [9, 4, 1, 0]
    for record, number in zip(records, (3, 2, 1, 0), strict=True):
        assert record["run"] == "sweep_runs.square"
        inner = {"width": 3, "shape": [1, 2]}
        assert record["settings"] == {"number": number, "log": str(log), "pause": 0.0, "inner": inner}
        assert record["versions"].keys() == {"icl_lib", "torch", "python"}
        assert record["result"]["threads"] == 1
        assert record["result"]["checkpoint"]
        assert math.isnan(record["result"]["lost"])
        assert (record["result"]["pid"] == os.getpid()) == (workers == 1)
    files = list((tmp_path / "new" / "folder").iterdir())
    assert all(re.fullmatch(r"square-[0-9a-f]{12}\.json", file.name) for file in files)
    on_disk = {json.dumps(json.loads(file.read_text())) for file in files}
    assert on_disk == {json.dumps(record) for record in records}


def test_results_do_not_depend_on_threads_or_workers(tmp_path, log):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        sums = [
            [record["result"]["sum"] for record in sweep(sweep_runs.square, tasks(log), tmp_path / str(n), workers=n)]
            for n in (1, 2)
        ]
        assert torch.get_num_threads() == 2  # put back
        with pytest.raises(RuntimeError, match="1 of 1 runs failed"):
            sweep(sweep_runs.returns_a_list, tasks(log, 1), tmp_path, workers=1)
        assert torch.get_num_threads() == 2
        alone = [sweep_runs.square(task, None)["sum"] for task in tasks(log)]
    finally:
        torch.set_num_threads(before)
    assert sums[0] == sums[1]
    assert alone != sums[0]  # with two threads the sums are rounded differently


def test_only_what_is_missing_is_run(tmp_path, log):
    first = sweep(sweep_runs.square, tasks(log, 2), tmp_path, workers=1)
    everything = sweep(sweep_runs.square, tasks(log, 4), tmp_path, workers=2)
    assert starts(log) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert json.dumps(everything[:2]) == json.dumps(first)
    assert json.dumps(sweep(sweep_runs.square, tasks(log, 4), tmp_path)) == json.dumps(everything)
    assert starts(log) == {0: 1, 1: 1, 2: 1, 3: 1}
    other = [Task(0, str(log), inner=Inner(width=4))]
    sweep(sweep_runs.square, other, tmp_path, workers=1)  # other settings in a nested field
    sweep(sweep_runs.takes_a_while, tasks(log, 1), tmp_path, workers=1)  # another function of the same settings
    assert len(list(tmp_path.glob("*.json"))) == 6


def test_progress_is_shown_but_not_in_the_book(tmp_path, log, capsys, monkeypatch):
    sweep(sweep_runs.square, tasks(log, 1), tmp_path, workers=1)
    sweep(sweep_runs.square, tasks(log, 2), tmp_path, workers=1)
    shown = capsys.readouterr()
    assert "square" in shown.out + shown.err
    assert "2/2" in shown.out + shown.err
    monkeypatch.setenv("ICL_LIB_BOOK_BUILD", "1")
    sweep(sweep_runs.square, tasks(log, 3), tmp_path, workers=1)
    monkeypatch.delenv("ICL_LIB_BOOK_BUILD")
    sweep(sweep_runs.square, tasks(log, 4), tmp_path, workers=1, progress=False)
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_killed_at_any_moment(tmp_path, log):
    folder = tmp_path / "records"

    def files():
        return {file: file.read_bytes() for file in folder.glob("*.json")}

    kill_in_the_middle(lambda: len(files()) >= 3, "square", folder, log, 8, 0.3, 2)
    survived, started = files(), starts(log)
    assert 3 <= len(survived) < 8
    finished = {json.loads(content)["settings"]["number"] for content in survived.values()}
    records = sweep(sweep_runs.square, tasks(log, 8, 0.3), folder, workers=2)
    assert [record["result"]["square"] for record in records] == [number**2 for number in range(8)]
    assert {file: files()[file] for file in survived} == survived
    assert {number: starts(log)[number] for number in finished} == {number: started[number] for number in finished}
    assert len(list(folder.iterdir())) == len(files()) == 8  # nothing besides


def test_killed_while_a_record_is_written(tmp_path, log, monkeypatch):
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(sweep_runs.square, tasks(log, 1), tmp_path, workers=1)
    [half] = tmp_path.glob("square-*")
    assert half.suffix == ".tmp"
    half.rename(half.with_name(half.name.replace(str(os.getpid()), "1")))  # as if by another process
    other = tmp_path / "other-123.json.1.tmp"
    other.touch()  # another sweep may be writing it now
    sweep(sweep_runs.square, tasks(log, 1), tmp_path, workers=1)
    [record] = tmp_path.glob("square-*")
    assert record.suffix == ".json"
    assert other.exists()


def test_a_long_run_continues_where_it_was_killed(tmp_path, log):
    folder = tmp_path / "killed"
    kill_in_the_middle(lambda: len(log.read_text().split()) > 23, "training", folder, log, 1, 0.05, 1)
    [partial] = folder.glob("*.partial.pt")
    assert not list(folder.glob("*.json"))
    before = len(log.read_text().split())
    [resumed] = sweep(sweep_runs.training, tasks(log, 1, 0.05), folder, workers=1)
    assert int(log.read_text().split()[before]) >= 20  # it did not start from the beginning
    assert not partial.exists()
    other = tmp_path / "other"
    [uninterrupted] = sweep(sweep_runs.training, tasks(other, 1), tmp_path / "whole", workers=1)
    assert len(other.read_text().split()) == 60
    assert resumed["result"] == uninterrupted["result"]


def test_workers_that_outlive_their_parent_do_no_harm(tmp_path, log):
    folder, other = tmp_path / "killed", tmp_path / "other"
    started = ("training", folder, log, 2, 0.03, 2)
    group = kill_in_the_middle(lambda: list(folder.glob("*.partial.pt")), *started, kill=os.kill)
    try:
        resumed = sweep(sweep_runs.training, tasks(log, 2, 0.03), folder, workers=2)
    finally:
        os.killpg(group, signal.SIGKILL)
    uninterrupted = sweep(sweep_runs.training, tasks(other, 2), tmp_path / "whole", workers=1)
    assert [record["result"] for record in resumed] == [record["result"] for record in uninterrupted]


@pytest.mark.parametrize("forgotten", [None, "generator", "optimiser"])
def test_a_checkpoint_must_hold_all_of_the_state(tmp_path, log, forgotten):
    class Interrupted(Checkpoint):
        def save(self, state):
            super().save(state)
            if len(state["losses"]) == 30:
                raise KeyboardInterrupt

    [task] = tasks(log, 1)
    fresh = torch.Generator().manual_seed(0)
    checkpoint = Checkpoint(tmp_path / "training.pt")
    with pytest.raises(KeyboardInterrupt):
        sweep_runs.training(task, Interrupted(checkpoint.path))
    state = checkpoint.load()
    if forgotten == "generator":
        state["generator"] = fresh.get_state()
    elif forgotten == "optimiser":
        state["optimiser"]["state"] = {}
    checkpoint.save(state)
    whole = sweep_runs.training(task, None)
    assert (sweep_runs.training(task, checkpoint) == whole) == (forgotten is None)


def test_a_checkpoint_left_beside_its_record_is_cleared(tmp_path, log):
    sweep(sweep_runs.square, tasks(log, 1), tmp_path, workers=1)
    [record] = tmp_path.glob("*.json")
    left = Checkpoint(record.with_suffix(".partial.pt"))
    left.save({"step": 1})  # as if the process had been killed between the two
    sweep(sweep_runs.square, tasks(log, 1), tmp_path, workers=1)
    assert not left.path.exists()


def test_a_damaged_checkpoint_is_not_overwritten(tmp_path, log):
    folder = tmp_path / "records"
    with pytest.raises(RuntimeError, match="1 of 1 runs failed"):
        sweep(sweep_runs.leaves_a_damaged_checkpoint, tasks(log, 1), folder, workers=1)
    with pytest.raises(RuntimeError, match=r"partial\.pt is not a checkpoint of this run: delete it") as caught:
        sweep(sweep_runs.leaves_a_damaged_checkpoint, tasks(log, 1), folder, workers=1)
    assert isinstance(caught.value.__cause__, ValueError)
    assert [file.read_bytes() for file in folder.iterdir()] == [b"damaged"]


def test_bad_checkpoints(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    assert checkpoint.load() is None
    checkpoint.clear()
    checkpoint.save({"step": 1})
    with pytest.raises(ValueError, match="state cannot be loaded again: give tensors"):
        checkpoint.save({"path": Task(1, "")})
    assert checkpoint.load() == {"step": 1}  # what was there is still there
    whole = checkpoint.path.read_bytes()
    says = re.escape(f"{checkpoint.path} is not a checkpoint of this run: delete it")
    foreign = tmp_path / "foreign.pt"
    Checkpoint(foreign).save({"step": 2})
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    wrong = [b"", whole[: len(whole) // 2], b"garbage", foreign.read_bytes(), (tmp_path / "tensor.pt").read_bytes()]
    for content in wrong:
        checkpoint.path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            checkpoint.load()
        assert checkpoint.path.read_bytes() == content
    checkpoint.clear()
    assert checkpoint.load() is None


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_keeps_what_is_finished(tmp_path, log, workers):
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed, first with Task\(number=2, (?s:.*)again") as caught:
        sweep(sweep_runs.square_unless_two, tasks(log), tmp_path / "records", workers=workers)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert 'raise ArithmeticError("two is broken")' in str(caught.value)  # where it happened, in another process too
    assert len(list((tmp_path / "records").iterdir())) == 3
    (tmp_path / "mended").touch()
    records = sweep(sweep_runs.square_unless_two, tasks(log), tmp_path / "records", workers=workers)
    assert [record["result"]["square"] for record in records] == [0, 1, 4, 9]
    assert starts(log) == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("run", "says"),
    [
        (sweep_runs.raises_what_cannot_travel, r"RuntimeError: Unpicklable\(.*salt and pepper"),
        (sweep_runs.returns_a_list, "returned a list: return a dict"),
        (sweep_runs.returns_a_tensor, "Tensor is not JSON serializable"),
    ],
)
def test_failures_of_other_kinds(tmp_path, log, workers, run, says):
    with pytest.raises(RuntimeError, match=f"2 of 2 runs failed, .*{says}"):
        sweep(run, tasks(log, 2), tmp_path, workers=workers)
    assert not list(tmp_path.glob("*.json"))


def test_a_worker_process_that_is_killed(tmp_path, log):
    with pytest.raises(RuntimeError, match=r"a worker process was killed.*run again with fewer workers"):
        sweep(sweep_runs.killed_at_two, tasks(log), tmp_path / "records", workers=2)
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_a_sweep_within_a_sweep(tmp_path, log):
    [record] = sweep(sweep_runs.sweeps_itself, tasks(log, 1), tmp_path, workers=1)
    assert record["result"] == {"inner": [100, 121]}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1]",
        lambda text: "{}",
        lambda text: text.replace('"number": 1', '"number": 7'),
        lambda text: text.replace("sweep_runs.square", "sweep_runs.cube"),
        lambda text: text.replace('"result"', '"outcome"'),
    ],
)
def test_a_file_that_is_not_the_record_is_not_touched(tmp_path, log, damage):
    sweep(sweep_runs.square, tasks(log, 3), tmp_path, workers=1)
    [file] = [file for file in tmp_path.glob("*.json") if '"number": 1' in file.read_text()]
    whole = file.read_text()
    file.write_text(damage(whole))
    assert file.read_text() != whole
    says = re.escape(f"{file} is not the record of Task(number=1") + ".*delete it"
    with pytest.raises(ValueError, match=says):
        sweep(sweep_runs.square, tasks(log, 5), tmp_path, workers=1)
    assert file.read_text() == damage(whole)
    assert len(starts(log)) == 3  # it is found before anything is run
    file.unlink()
    sweep(sweep_runs.square, tasks(log, 3), tmp_path, workers=1)
    assert starts(log) == {0: 1, 1: 2, 2: 1}


@dataclass
class Changeable:
    number: int = 0


@dataclass(frozen=True)
class HoldsTensor:
    tensor: torch.Tensor


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"settings": []}, r"settings is \[\]: give a list of at least one"),
        ({"settings": iter([Task(1, "")])}, "settings is <.*give a list"),
        ({"settings": "ab"}, "settings is 'ab': give a list"),
        ({"settings": [Task(1, ""), {"number": 1}]}, r"settings\[1\] is {'number': 1}: give .*frozen"),
        ({"settings": [Changeable()]}, r"settings\[0\] is Changeable.*frozen"),
        ({"settings": [Task]}, r"settings\[0\] is <class .*give an instance"),
        ({"settings": [HoldsTensor(torch.ones(1))]}, r"settings\[0\] is HoldsTensor.*fields that JSON can hold"),
        ({"settings": [Task(1, ""), Task(2, ""), Task(1, "")]}, r"settings\[2\] has the same fields as settings\[0\]"),
        ({"workers": 0}, "workers is 0"),
        ({"workers": 1.5}, "workers is 1.5"),
        ({"workers": 2, "dask": "tcp://host:8786"}, "workers is 2 and dask is 'tcp://host:8786'.*give only one"),
        ({"run": lambda settings, checkpoint: {}}, "run is <function .*at the top level of a module"),
        ({"run": 3}, "run is 3"),
    ],
)
def test_bad_input(tmp_path, arguments, says):
    given = {"run": sweep_runs.square, "settings": [Task(1, "")], "folder": tmp_path / "new", **arguments}
    with pytest.raises(ValueError, match=says):
        sweep(**given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_folder_that_is_a_file(tmp_path, log, below):
    with pytest.raises(ValueError, match=r"folder is .* but .*log' is a file: give a new or existing folder"):
        sweep(sweep_runs.square, tasks(log), log / below)


@pytest.mark.parametrize(
    ("package", "dask", "extra"), [("joblib", None, "figures"), ("distributed", "tcp://host:8786", "cluster")]
)
def test_packages_that_are_missing(tmp_path, log, monkeypatch, package, dask, extra):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is not installed: pip install 'icl_lib\[{extra}\]'"):
        sweep(sweep_runs.square, tasks(log), tmp_path, dask=dask)


@pytest.fixture(scope="module")
def cluster():
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


def test_dask(tmp_path, log, cluster):
    records = sweep(sweep_runs.square, tasks(log, 4, 0.1), tmp_path / "dask", dask=cluster.scheduler_address)
    here = sweep(sweep_runs.square, tasks(log, 4, 0.1), tmp_path / "here", workers=1)
    assert [record["result"]["sum"] for record in records] == [record["result"]["sum"] for record in here]
    assert {record["result"]["pid"] for record in records}.isdisjoint({os.getpid()})
    assert not any(record["result"]["checkpoint"] for record in records)  # the workers' disks are not this one
    again = sweep(sweep_runs.square, tasks(log, 4, 0.1), tmp_path / "dask", dask="tcp://nobody:1")  # nothing is missing
    assert json.dumps(again) == json.dumps(records)


def test_dask_with_a_worker_killed_in_the_middle(tmp_path, log, cluster):
    def kill_one():
        first = until(lambda: [line.split() for line in log.read_text().splitlines() if line.startswith("2 ")])
        os.kill(int(first[0][1]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    records = sweep(sweep_runs.killed_by_the_test, tasks(log, 8), tmp_path / "records", dask=cluster.scheduler_address)
    killer.join()
    assert starts(log)[2] == 2  # what the worker was doing was done again
    assert [record["result"]["square"] for record in records] == [number**2 for number in range(8)]
    assert len(list((tmp_path / "records").iterdir())) == 8


def test_dask_with_runs_that_fail(tmp_path, log, cluster):
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed, first with Task\(number=2") as caught:
        sweep(sweep_runs.square_unless_two, tasks(log), tmp_path / "records", dask=cluster.scheduler_address)
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_dask_with_a_run_that_kills_every_worker(tmp_path, log, cluster):
    with pytest.raises(RuntimeError, match=r"1 of 4 runs failed, first with Task\(number=2.*KilledWorker"):
        sweep(sweep_runs.killed_at_two, tasks(log), tmp_path / "records", dask=cluster.scheduler_address)
    assert len(list((tmp_path / "records").iterdir())) == 3


def test_dask_workers_with_several_threads_take_turns(tmp_path, log):
    from dask.distributed import LocalCluster

    with LocalCluster(n_workers=1, threads_per_worker=4, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        sweep(sweep_runs.takes_a_while, tasks(log, 6), tmp_path, dask=cluster.scheduler_address)
    assert log.read_text().split() == ["start", "end"] * 6


def test_a_scheduler_that_is_killed(tmp_path, log):
    environment = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    contact, folder = tmp_path / "scheduler.json", tmp_path / "records"
    options = ["--scheduler-file", str(contact), "--no-dashboard"]

    def start(*what):
        command = [sys.executable, "-m", "dask", *what, *options]
        return subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def address():
        with contextlib.suppress(FileNotFoundError, ValueError):  # not written yet, or not all of it
            return json.loads(contact.read_text())["address"]

    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", "0")
    worker = start("worker", "--nthreads", "1", "--no-nanny")

    def kill():
        try:
            until(lambda: len(list(folder.glob("*.json"))) >= 2)
        finally:
            scheduler.kill()

    killer = threading.Thread(target=kill)
    try:
        dask = until(address)
        killer.start()
        with pytest.raises(RuntimeError, match=r"runs failed, .*scheduler-connection-lost"):
            sweep(sweep_runs.square, tasks(log, 8, 0.3), folder, dask=dask)
    finally:
        killer.join()
        for process in (scheduler, worker):
            process.kill()
            process.wait()
    assert 2 <= len(list(folder.iterdir())) < 8


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://127.0.0.1:9"])
def test_no_scheduler(tmp_path, log, monkeypatch, address):
    monkeypatch.setattr(module, "CONNECT_SECONDS", 1)
    with pytest.raises(ConnectionError, match=f"no Dask scheduler at dask='{address}' within 1 s: start one"):
        sweep(sweep_runs.square, tasks(log), tmp_path, dask=address)
