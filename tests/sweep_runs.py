"""Runs for the tests of sweeps, in a module that worker processes can import."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from icl_lib.paper.sweep import sweep


@dataclass(frozen=True)
class Inner:
    width: int = 3
    shape: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Task:
    """A number to work on, and the file in which every start of a run is counted."""

    number: int
    log: str
    pause: float = 0.0
    inner: Inner = Inner()


def note(settings: Task, line: str) -> None:
    with Path(settings.log).open("a") as file:  # one short line at once: appends of several processes do not mix
        file.write(f"{line}\n")


def until(happened):
    """Wait for something, but not forever; the answer is what it gives."""
    end = time.monotonic() + 60
    while not (answer := happened()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return answer


def square(settings, checkpoint):
    note(settings, f"{settings.number} {os.getpid()}")
    time.sleep(settings.pause)
    generator = torch.Generator().manual_seed(settings.number)
    total = torch.randn(1_000_003, generator=generator).sum().item()  # rounded differently with every number of threads
    return {
        "square": settings.number**2,
        "sum": total,
        "threads": torch.get_num_threads(),
        "pid": os.getpid(),
        "checkpoint": checkpoint is not None,
        "lost": float("nan"),
    }


def square_unless_two(settings, checkpoint):
    if settings.number == 2 and not Path(settings.log).with_name("mended").exists():
        raise ArithmeticError("two is broken")
    return square(settings, checkpoint)


def killed_at_two(settings, checkpoint):
    """At two, kill the process, but let the other three finish first."""
    if settings.number == 2:
        until(lambda: len(list(Path(settings.log).with_name("records").glob("*.json"))) == 3)
        os.kill(os.getpid(), signal.SIGKILL)
    return square(settings, checkpoint)


def killed_by_the_test(settings, checkpoint):
    """At two, wait to be killed; the second time there is nothing to wait for."""
    result = square(settings, checkpoint)
    if settings.number == 2:
        until(lambda: Path(settings.log).read_text().count(f"{settings.number} ") > 1)
    return result


class Unpicklable(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raises_what_cannot_travel(settings, checkpoint):
    raise Unpicklable("salt", "pepper")


def returns_a_list(settings, checkpoint):
    return [settings.number]


def returns_a_tensor(settings, checkpoint):
    return {"tensor": torch.ones(2)}


def takes_a_while(settings, checkpoint):
    note(settings, "start")
    time.sleep(0.02)
    note(settings, "end")
    return {}


def sweeps_itself(settings, checkpoint):
    inner = [Task(number, settings.log) for number in (10, 11)]
    return {"inner": [record["result"]["square"] for record in sweep(square, inner, f"{settings.log}.d", workers=1)]}


def training(settings, checkpoint):
    """Gradient descent on random data: what it ends at depends on every draw and on Adam's moments."""
    generator = torch.Generator().manual_seed(settings.number)
    weight = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([weight], 0.1)
    losses = []
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        generator.set_state(state["generator"])
        weight.data.copy_(state["weight"])
        optimiser.load_state_dict(state["optimiser"])
        losses = state["losses"]
    while len(losses) < 60:
        note(settings, f"{len(losses)}")
        time.sleep(settings.pause)
        inputs = torch.randn(8, 4, generator=generator, dtype=torch.float64)
        loss = (inputs @ weight - inputs.sum(-1)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if checkpoint is not None and len(losses) % 5 == 0:
            checkpoint.save(
                {
                    "generator": generator.get_state(),
                    "weight": weight.detach(),
                    "optimiser": optimiser.state_dict(),
                    "losses": losses,
                }
            )
    return {"weight": weight.tolist(), "losses": losses}


def leaves_a_damaged_checkpoint(settings, checkpoint):
    checkpoint.load()
    checkpoint.path.write_bytes(b"damaged")
    raise ArithmeticError


def main():
    """What the tests start in order to kill it; the arguments are those of the line below."""
    name, folder, log, count, pause, workers = sys.argv[1:]
    tasks = [Task(number, log, float(pause)) for number in range(int(count))]
    sweep(globals()[name], tasks, folder, workers=int(workers), progress=False)
