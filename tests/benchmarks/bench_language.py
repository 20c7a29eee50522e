"""Time and memory of verifying a language model, relative to one forward pass over its prompt.

The model is a Llama with random weights: 12 blocks on the CPU and, if there is a GPU, 8 billion parameters on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.bench_cost import digits, interleaved, measured_with, quartiles, ratio, written
from benchmarks.memory import peak_memory
from icl_lib import verify

RESULTS = Path(__file__).resolve().parents[2] / "book" / "data" / "cost_language.json"


@dataclass(frozen=True)
class LlamaShape:
    """A Llama with random weights and one prompt, whose last token is the query."""

    tokens: int
    width: int
    hidden: int
    blocks: int
    heads: int
    key_value_heads: int
    vocabulary: int
    dtype: str
    device: str

    def __str__(self) -> str:
        return f"{self.blocks} blocks of width {self.width}, {self.tokens} tokens, {self.dtype} on {self.device}"

    def model(self) -> LlamaForCausalLM:
        """Create the model on its device and in its precision, without a copy elsewhere."""
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.hidden,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=self.tokens,
        )
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            with torch.device(self.device):
                return LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """Return the calls to measure."""
        torch.manual_seed(0)
        model = self.model()
        ids = torch.randint(0, self.vocabulary, (1, self.tokens), device=self.device)
        last = self.tokens - 1

        def on_device(call: Callable[[], Any]) -> Callable[[], Any]:
            def timed() -> Any:
                result = call()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                return result

            return timed

        calls = {
            "forward": lambda: model(ids, use_cache=False),
            "last token": lambda: verify(model, ids, last),
        }
        if self.device == "cpu":
            calls["all positions"] = lambda: verify(model, ids, last, reference="self")
        return {name: on_device(call) for name, call in calls.items()}


# Each shape with its number of rounds.
SHAPES = {LlamaShape(512, 768, 2048, 12, 12, 12, 32000, "float32", "cpu"): 7}
if torch.cuda.is_available():
    SHAPES[LlamaShape(8192, 4096, 14336, 32, 32, 8, 128256, "bfloat16", "cuda")] = 7


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Collect the rows; once all are there, write the numbers that the book reads."""
    rows: list[dict[str, Any]] = []
    yield rows
    if len(rows) == len(SHAPES):
        found = {
            **measured_with("icl_lib", "torch", "transformers"),
            "shapes": rows,
        }
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(written(found), encoding="utf-8")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_language(benchmark: Any, results: list[dict[str, Any]], capsys: Any, shape: LlamaShape) -> None:
    calls = shape.calls()
    memory = {name: peak_memory(call, shape.device) for name, call in calls.items()}  # also the warm-up
    reports = {name: call() for name, call in calls.items() if name != "forward"}
    if shape.dtype == "float32":
        assert all(report.holds for report in reports.values())
    seconds = interleaved(benchmark, calls, SHAPES[shape])
    row = {
        **asdict(shape),
        "rounds": SHAPES[shape],
        "seconds": {name: quartiles(values) for name, values in seconds.items()},
        "ratios": {f"{name} / forward": ratio(seconds, name, "forward") for name in reports},
        "memory": memory,
        "errors": {name: digits(report.max_error) for name, report in reports.items()},
        "output errors": {name: digits(report.output_error) for name, report in reports.items()},
        "controls": {name: digits(report.output_control) for name, report in reports.items()},
    }
    if shape.device == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    benchmark.extra_info.update(row)
    results.append(row)
    with capsys.disabled():
        table = [
            {
                "shape": str(shape),
                "time of": name,
                "over forward": "{1:.2f} ({0:.2f} … {2:.2f})".format(*row["ratios"][f"{name} / forward"]),
                "memory, MB": memory[name] / 1e6,
                "forward, MB": memory["forward"] / 1e6,
                "largest error": row["errors"][name],
            }
            for name in reports
        ]
        print(f"\n\n{tabulate(table, headers='keys', floatfmt='.3g')}\n")
