"""Time and memory of a forward pass, of a verification with low-rank edits, and of one with dense matrices.

Timings on a shared machine drift. So the calls that are compared take turns, and their ratio is taken within a round.
The results are medians and quartiles over rounds.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate

from benchmarks.dense import LIMIT, dense_bytes, verify_dense
from benchmarks.memory import peak_memory
from benchmarks.operations import fitted_exponent, operations
from icl_lib import Transformer, TransformerConfig, verify
from icl_lib.measures import relative_error
from icl_lib.models.report import TOLERANCE

RESULTS = Path(__file__).resolve().parents[2] / "book" / "data" / "cost.json"
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Shape:
    """A model and its prompts; a prompt has ``context`` tokens and one query."""

    batch: int
    context: int
    width: int
    blocks: int
    heads: int

    def __str__(self) -> str:
        return f"batch {self.batch}, context {self.context}, width {self.width}, blocks {self.blocks}"

    @property
    def tokens(self) -> int:
        return self.context + 1

    def calls(self) -> Calls:
        """Return the calls to measure, on one random model and its prompts."""
        torch.manual_seed(0)
        model = Transformer(
            TransformerConfig(dim=self.width, blocks=self.blocks, heads=self.heads, hidden_layers=2, norm="pre")
        ).requires_grad_(False)
        inputs = torch.randn(self.batch, self.tokens, self.width)
        return {
            "dense": lambda: verify_dense(model, inputs),
            "self": lambda: verify(model, inputs, self.context, reference="self"),
            "forward": lambda: model(inputs),
            "verify": lambda: verify(model, inputs, self.context),
        }

    def operations(self) -> dict[str, int]:
        return operations(self.batch, self.tokens, self.width, self.blocks)


# Each shape with its number of rounds.
SHAPES = {
    Shape(128, 50, 3, 5, heads=3): 21,
    Shape(128, 50, 32, 5, heads=4): 11,
    Shape(32, 128, 128, 4, heads=4): 7,
    Shape(8, 128, 256, 4, heads=8): 7,
    Shape(1, 1024, 768, 12, heads=12): 3,
}
# Sizes from small to large along one axis, with the others fixed.
AXES = {
    "width": [Shape(8, 127, width, 1, heads=4) for width in (64, 128, 256, 512, 1024)],
    "context": [Shape(16, context, 64, 1, heads=4) for context in (64, 128, 256, 512, 1024, 2048)],
    "depth": [Shape(8, 127, 64, blocks, heads=4) for blocks in (1, 2, 4, 8, 16)],
}
FIELDS = {"width": "width", "context": "context", "depth": "blocks"}
ASYMPTOTIC = {"width": 2, "context": 2, "depth": 1}
SCALING_ROUNDS = 5


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Collect the rows; once all are there, print them and write the numbers that the book reads."""
    found: dict[str, Any] = {
        "settings": {"dtype": "float32", "device": "cpu", "limit": int(LIMIT)},
        **measured_with("icl_lib", "torch"),
        "shapes": [],
        "scaling": [],
    }
    yield found
    if (len(found["shapes"]), len(found["scaling"])) == (len(SHAPES), len(AXES)):
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(written(found), encoding="utf-8")
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            print(f"\n\n{summary(found)}\n")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_verification(benchmark: Any, results: dict[str, Any], shape: Shape) -> None:
    calls, needed = shape.calls(), dense_bytes(shape.batch, shape.tokens, shape.width)
    if needed > LIMIT:
        del calls["dense"]
    memory = {name: peak_memory(call) for name, call in calls.items()}  # also the warm-up
    errors = {"verify": calls["verify"]().max_error}
    if "dense" in calls:
        errors["dense"] = max(relative_error(*pair).max().item() for pair in calls["dense"]())
    assert max(errors.values()) <= TOLERANCE[torch.float32]
    seconds = interleaved(benchmark, calls, SHAPES[shape])
    ratios = {
        "verify / forward": ratio(seconds, "verify", "forward"),
        "self / forward": ratio(seconds, "self", "forward"),
    }
    if "dense" in calls:
        ratios["dense / verify"] = ratio(seconds, "dense", "verify")
    row = {
        **asdict(shape),
        "rounds": SHAPES[shape],
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": ratios,
        "memory": memory,
        "errors": {name: digits(value) for name, value in errors.items()},
        "dense matrices": needed,
        "operations": shape.operations(),
    }
    benchmark.extra_info.update(row)
    results["shapes"].append(row)


@pytest.mark.parametrize("axis", AXES)
def bench_scaling(benchmark: Any, results: dict[str, Any], axis: str) -> None:
    shapes = AXES[axis]
    sizes = [getattr(shape, FIELDS[axis]) for shape in shapes]
    calls = {(name, size): shape.calls()[name] for size, shape in zip(sizes, shapes, strict=True) for name in COMPARED}
    for call in calls.values():
        call()
    seconds = interleaved(benchmark, calls, SCALING_ROUNDS)
    row: dict[str, Any] = {"axis": axis, "fixed": {k: v for k, v in asdict(shapes[0]).items() if k != FIELDS[axis]}}
    row |= {"size": sizes, "asymptotic": ASYMPTOTIC[axis]}
    for name in COMPARED:
        counts = [shape.operations()[name] for shape in shapes]
        measured = [quartiles(seconds[name, size]) for size in sizes]
        fitted, error = fitted_exponent(sizes, [median for _, median, _ in measured])
        predicted, _ = fitted_exponent(sizes, counts)
        row[name] = {
            "seconds": measured,
            "operations": counts,
            "fitted": digits(fitted),
            "standard error": digits(error),
            "predicted": digits(predicted),
        }
    benchmark.extra_info.update(row)
    results["scaling"].append(row)


COMPARED = ("forward", "verify")


def interleaved(benchmark: Any, calls: dict[Any, Callable[[], Any]], rounds: int) -> dict[Any, Sequence[float]]:
    """Return the seconds of each call in each round; the calls take turns, and pytest-benchmark shows the last one."""
    *others, (last, timed) = calls.items()
    seconds: dict[Any, Sequence[float]] = {name: [] for name in calls}

    def run_others() -> None:
        for name, call in others:
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(timed, setup=run_others, rounds=rounds)
    seconds[last] = benchmark.stats.stats.data
    return seconds


def ratio(seconds: dict[str, Sequence[float]], above: str, below: str) -> list[float]:
    """Return the quartiles of the ratio within a round."""
    return quartiles([a / b for a, b in zip(seconds[above], seconds[below], strict=True)])


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the lower quartile, the median and the upper quartile."""
    return [digits(value) for value in statistics.quantiles(values, n=4, method="inclusive")]


def digits(value: float) -> float:
    """Round to four digits, more than repeated runs share."""
    return float(f"{value:.4g}")


def measured_with(*packages: str) -> dict[str, Any]:
    """Return the versions and the machine that numbers are stored with."""
    return {
        "versions": {name: version(name) for name in packages} | {"python": platform.python_version()},
        "machine": {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()},
    }


def written(found: dict[str, Any]) -> str:
    """Return the results as JSON, with one row on each line."""
    parts = []
    for name, value in found.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) else None
        parts.append(f'"{name}": ' + (f"[\n{rows}\n]" if rows else json.dumps(value)))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def summary(found: dict[str, Any]) -> str:
    """Return the tables that `make bench` prints."""
    shapes = [
        {
            "shape": ", ".join(f"{name} {row[name]}" for name in ("batch", "context", "width", "blocks")),
            "forward, s": row["seconds"]["forward"][1],
            **{name: "{1:.2f} ({0:.2f} … {2:.2f})".format(*values) for name, values in row["ratios"].items()},
            "forward, MB": row["memory"]["forward"] / 1e6,
            "extra": row["memory"]["verify"] / row["memory"]["forward"] - 1,
            "dense matrices, MB": row["dense matrices"] / 1e6,
        }
        for row in found["shapes"]
    ]
    exponents = [
        {"time of": name, "over": row["axis"], **{k: row[name][k] for k in ("fitted", "standard error", "predicted")}}
        for row in found["scaling"]
        for name in COMPARED
    ]
    return "\n\n".join(tabulate(rows, headers="keys", floatfmt=".3g") for rows in (shapes, exponents))
