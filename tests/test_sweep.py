"""Sweeps: nothing that was finished is lost, and nothing is taken for the result of other code."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch

from icl_lib.paper import sweep as module
from icl_lib.paper.sweep import Checkpoint, sweep


@dataclass(frozen=True)
class Task:
    number: int
    log: str  # the file in which every start of a run is noted
    shape: tuple[int, ...] = (1, 2)


def note(settings, number):
    with Path(settings.log).open("a") as file:  # one short line at once: appends of several processes do not mix
        file.write(f"{number}\n")


def square(settings, checkpoint):
    note(settings, settings.number)
    generator = torch.Generator().manual_seed(settings.number)
    total = torch.randn(1_000_003, generator=generator).sum().item()  # rounded differently with every number of threads
    return {"square": settings.number**2, "sum": total, "pid": os.getpid(), "lost": float("nan")}


def broken(settings, checkpoint):
    if settings.number == 2 and not Path(settings.log).with_name("mended").exists():
        raise ArithmeticError("two is broken")
    return square(settings, checkpoint)


def bad_result(settings, checkpoint):
    return settings.number or {"tensor": torch.ones(2)}


def killed(settings, checkpoint):
    os.kill(os.getpid(), signal.SIGKILL)


def counting(settings, checkpoint):
    state = checkpoint.load() or {"step": 0, "sum": 0.0}
    while state["step"] < 40:
        note(settings, state["step"])
        time.sleep(0.02)
        state = {"step": state["step"] + 1, "sum": state["sum"] / 3 + state["step"]}
        if state["step"] % 5 == 0:
            checkpoint.save(state)
    return state


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log").touch()
    return tmp_path / "log"


def tasks(log, count=4):
    return [Task(number, str(log)) for number in range(count)]


def starts(log):
    return Counter(map(int, log.read_text().split()))


def results(records, name):
    return [record["result"][name] for record in records]


def test_records_come_in_order_and_are_on_disk_whatever_the_number_of_workers(tmp_path, log):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        here, there = (sweep(square, tasks(log)[::-1], tmp_path / "new" / str(n), workers=n) for n in (1, 2))
        assert torch.get_num_threads() == 2  # put back
        alone = [square(task, None)["sum"] for task in tasks(log)[::-1]]
    finally:
        torch.set_num_threads(before)
    assert results(here, "sum") == results(there, "sum")
    assert alone != results(here, "sum")  # with two threads the sums are rounded differently
    assert set(results(here, "pid")) == {os.getpid()}
    assert os.getpid() not in results(there, "pid")
    assert results(here, "square") == results(there, "square") == [9, 4, 1, 0]
    assert there[0]["settings"] == {"number": 3, "log": str(log), "shape": [1, 2]}
    assert there[0].keys() == {"run", "code", "versions", "settings", "result"}
    assert there[0]["versions"].keys() == {"icl_lib", "torch", "python"}
    files = list((tmp_path / "new" / "2").iterdir())
    assert all(re.fullmatch(r"square-[0-9a-f]{12}\.json", file.name) for file in files)
    assert {json.dumps(json.loads(file.read_text())) for file in files} == {json.dumps(record) for record in there}


def test_only_what_is_missing_or_damaged_is_run(tmp_path, log, capsys):
    first = sweep(square, tasks(log, 2), tmp_path, workers=1, progress=False)
    everything = sweep(square, tasks(log, 4) + tasks(log, 1), tmp_path, workers=1, progress=False)
    assert json.dumps(everything[:2] + everything[4:]) == json.dumps([*first, first[0]])
    assert json.dumps(sweep(square, tasks(log, 4), tmp_path, progress=False)) == json.dumps(everything[:4])
    assert starts(log) == {0: 1, 1: 1, 2: 1, 3: 1}
    assert capsys.readouterr().err == ""
    sweep(square, [Task(0, str(log), shape=(1, 3))], tmp_path, workers=1)
    assert starts(log)[0] == 2
    assert "1/1" in capsys.readouterr().err
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text()[:50])
    assert results(sweep(square, tasks(log, 2), tmp_path, workers=1), "sum") == results(first, "sum")


SCRIPT = """
from dataclasses import make_dataclass
from icl_lib.paper.sweep import sweep
Settings = make_dataclass("Settings", [])
def helper():
    return "helped"
def run(settings, checkpoint):
    return {"value": "a " + helper()}
if __name__ == "__main__":
    print(sweep(run, [Settings()], "records", workers=2, progress=False)[0]["result"]["value"])
"""


@pytest.fixture
def value(tmp_path, monkeypatch):
    """What a sweep gives for the function ``run`` of a file, and how many records there are now."""
    (tmp_path / "icl_lib" / "paper").mkdir(parents=True)
    (tmp_path / "icl_lib" / "theorem.py").touch()
    monkeypatch.setattr(module, "__file__", str(tmp_path / "icl_lib" / "paper" / "sweep.py"))

    def value(text, file="a.py"):
        (tmp_path / file).write_text(text)
        script = ModuleType("script")
        script.__file__ = str(tmp_path / file)
        monkeypatch.setitem(sys.modules, "script", script)
        exec(text, vars(script))
        [record] = sweep(script.run, [script.Settings()], tmp_path / "records", workers=1, progress=False)
        return record["result"]["value"], len(list((tmp_path / "records").iterdir()))

    assert value(SCRIPT) == ("a helped", 1)
    return value


@pytest.mark.parametrize(("old", "new"), [('"a "', '"b "'), ('"helped"', '"edited"')])
def test_a_file_with_other_code_has_other_results(value, old, new):
    assert value(SCRIPT) == value(SCRIPT, "copy.py") == ("a helped", 1)  # the same code
    expected = "a helped".replace(old.strip('"'), new.strip('"'))
    assert value(SCRIPT.replace(old, new), "b.py") == (expected, 2)
    assert value(SCRIPT.replace(old, new)) == (expected, 2)  # the first file, edited
    assert value(SCRIPT) == ("a helped", 2)


def test_another_library_or_version_runs_again(value, tmp_path, monkeypatch):
    (tmp_path / "icl_lib" / "theorem.py").write_text("edited = True")
    assert value(SCRIPT)[1] == 2
    monkeypatch.setattr(torch, "__version__", "0.1")
    assert value(SCRIPT)[1] == 3
    monkeypatch.setattr(module, "version", lambda name: "0.0.9")
    assert value(SCRIPT)[1] == 4


@pytest.mark.slow
def test_a_script_whose_function_is_in_main(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    assert run.stdout == "a helped\n"


@pytest.mark.slow
def test_a_long_run_continues_where_it_was_killed(tmp_path, log):
    code = f"from test_sweep import *; sweep(counting, tasks({str(log)!r}, 1), {str(tmp_path / 'out')!r}, workers=1)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent)
    end = time.monotonic() + 60
    while len(log.read_text().split()) < 18 and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert [file.suffix for file in (tmp_path / "out").iterdir()] == [".pt"]
    [resumed] = sweep(counting, tasks(log, 1), tmp_path / "out", workers=1)
    assert (starts(log)[14], starts(log)[15], starts(log)[39]) == (1, 2, 1)  # it did not start from the beginning
    assert [file.suffix for file in (tmp_path / "out").iterdir()] == [".json"]
    [whole] = sweep(counting, tasks(tmp_path / "other", 1), tmp_path / "whole", workers=1)
    assert resumed["result"] == whole["result"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, log, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "state.pt")
    checkpoint.save({"step": 1})
    monkeypatch.setattr(os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sweep(square, tasks(log, 1), tmp_path / "records", workers=1)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"step": 2})
    assert checkpoint.load() == {"step": 1}
    assert {path.name for path in tmp_path.rglob("*")} == {"log", "records", "state.pt"}


def test_bad_checkpoints(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.pt")
    checkpoint.save({"step": 1})
    with pytest.raises(pickle.UnpicklingError, match=r"test_sweep\.Task"):
        checkpoint.save({"task": Task(1, "")})
    assert checkpoint.load() == {"step": 1}  # what was there is still there
    whole = checkpoint.path.read_bytes()
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    for content in (b"", whole[: len(whole) // 2], b"garbage", (tmp_path / "tensor.pt").read_bytes()):
        checkpoint.path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{checkpoint.path} is not a checkpoint: delete it")):
            checkpoint.load()


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path, log, workers):
    says = r'1 of 4 runs failed, first with Task\(number=2, (?s:.*)raise ArithmeticError\("two is broken"\)'
    with pytest.raises(RuntimeError, match=says):
        sweep(broken, tasks(log), tmp_path / "records", workers=workers)
    (tmp_path / "mended").touch()
    assert results(sweep(broken, tasks(log), tmp_path / "records", workers=workers), "square") == [0, 1, 4, 9]
    assert starts(log) == {0: 1, 1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"run": lambda settings, checkpoint: {}}, ValueError, "run is <function .*at the top level of a file"),
        ({"settings": [Task(1, ""), {"number": 1}]}, ValueError, r"settings\[1\] is {'number': 1}: give a dataclass"),
        ({"settings": [Task(torch.ones(1), "")]}, ValueError, r"settings\[0\] is Task.*fields JSON can hold"),
        ({"run": bad_result}, RuntimeError, r"first with Task\(number=1, (?s:.*)'int' object is not iterable"),
        ({"run": bad_result, "settings": [Task(0, "")]}, RuntimeError, "(?s:.*)Tensor is not JSON serializable"),
        ({"run": killed, "workers": 2}, RuntimeError, r"worker process .* was unexpectedly terminated"),
    ],
)
def test_bad_input(tmp_path, arguments, error, says):
    given = {"run": square, "settings": [Task(1, "")], "folder": tmp_path / "new", "workers": 1, **arguments}
    with pytest.raises(error, match=says):
        sweep(**given)
    assert not list(tmp_path.rglob("*.*"))
