"""Time and memory of the weights after each token, compared with a forward pass and with one pass for each prefix."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate

from benchmarks.bench_cost import interleaved, measured_with, quartiles, ratio
from benchmarks.memory import peak_memory
from benchmarks.operations import fitted_exponent
from icl_lib import Transformer, TransformerConfig
from icl_lib.dynamics import trajectory

RESULTS = Path(__file__).resolve().parents[2] / "book" / "data" / "cost_trajectory.json"
TOKENS = 1000
# Each width with its number of rounds.
WIDTHS = {64: 21, 256: 11, 768: 7}
LENGTHS = (500, 1000, 2000, 4000)
EACH_PREFIX = 64
"""The only width at which one pass for each prefix is measured, since this takes a thousand passes."""


def calls(width: int, tokens: int) -> dict[str, Callable[[], Any]]:
    """Return the calls to measure, on a random model of one block and a prompt of ``tokens`` tokens."""
    torch.manual_seed(0)
    config = TransformerConfig(dim=width, heads=8, skip=False)
    model = Transformer(config).requires_grad_(False)
    block, sequence = model.contextual_block(), torch.randn(1, tokens + 1, width)
    context, query = sequence[:, :-1], sequence[:, -1]
    prefixes = [context[:, :i] for i in range(tokens + 1)]
    return {
        "each prefix": lambda: [block.read(prefix, query) for prefix in prefixes],
        "at the query": lambda: block(context, query),
        "forward": lambda: model(sequence),
        "activations": lambda: trajectory(block, context, query),
        "trajectory": lambda: trajectory(block, context, query).updates,
    }


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """Collect the rows; once all are there, print them and write the numbers that the book reads."""
    found: dict[str, Any] = {
        "settings": {"dtype": "float32", "device": "cpu", "tokens": TOKENS},
        **measured_with("icl_lib", "torch"),
        "widths": [],
        "memory": [],
    }
    yield found
    if len(found["widths"]) == len(WIDTHS) and found["memory"]:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            rows = [{"width": row["width"], **row["ratios"]} for row in found["widths"]]
            print(f"\n\n{tabulate(rows, headers='keys')}\n\n{tabulate(found['memory'], headers='keys')}\n")


@pytest.mark.parametrize("width", WIDTHS)
def bench_trajectory(benchmark: Any, results: dict[str, Any], width: int) -> None:
    compared = calls(width, TOKENS)
    if width != EACH_PREFIX:
        del compared["each prefix"]
    for call in compared.values():
        call()
    seconds = interleaved(benchmark, compared, WIDTHS[width])
    ratios = {
        f"{name} / forward": ratio(seconds, name, "forward")
        for name in ("each prefix", "trajectory")
        if name in seconds
    }
    ratios["activations / at the query"] = ratio(seconds, "activations", "at the query")
    row = {
        "width": width,
        "rounds": WIDTHS[width],
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": ratios,
    }
    benchmark.extra_info.update(row)
    results["widths"].append(row)


def bench_trajectory_memory(benchmark: Any, results: dict[str, Any]) -> None:
    """Measure peak memory over the number of tokens; the exponent is the slope of a line on log–log axes."""
    peaks = {}
    for name in ("forward", "trajectory"):
        peaks[name] = [peak_memory(calls(EACH_PREFIX, tokens)[name]) for tokens in LENGTHS]
        slope, _ = fitted_exponent(LENGTHS, peaks[name])
        results["memory"].append({"of": name, "tokens": list(LENGTHS), "bytes": peaks[name], "exponent": slope})
    benchmark.pedantic(calls(EACH_PREFIX, LENGTHS[-1])["trajectory"], rounds=1)
