"""Time and memory of compiling a prompt from 64 queries, relative to one forward pass over each with its prompt."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.bench_cost import interleaved, ratio
from benchmarks.bench_language import LlamaShape
from benchmarks.memory import peak_memory
from icl_lib import compile_prompt

SHAPE = LlamaShape(96, 512, 1408, 6, 8, 8, 8000, "float32", "cpu")
PROMPT, QUERIES, LENGTH, ROUNDS = 64, 64, 3, 3


def bench_compile(benchmark: Any, capsys: Any) -> None:
    torch.manual_seed(0)
    model = SHAPE.model()
    prompt, queries = torch.randint(SHAPE.vocabulary, (PROMPT,)), torch.randint(SHAPE.vocabulary, (QUERIES, LENGTH))
    whole = torch.cat([prompt.expand(QUERIES, -1), queries], dim=1)
    calls = {
        "forward": lambda: model(whole, use_cache=False, logits_to_keep=1),
        "compile": lambda: compile_prompt(model, prompt, list(queries)),
    }
    memory = {name: peak_memory(call) for name, call in calls.items()}  # also the warm-up
    over_forward = ratio(interleaved(benchmark, calls, ROUNDS), "compile", "forward")
    dense = 3 * SHAPE.blocks * SHAPE.width * SHAPE.hidden * 4  # all edits as matrices, in float32
    benchmark.extra_info.update({"compile / forward": over_forward, "memory": memory, "dense edits": dense})
    with capsys.disabled():
        shown = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in {**memory, "dense edits": dense}.items())
        print(f"\n\ncompiling from {QUERIES} queries takes {over_forward[1]:.2f} forward passes; {shown}\n")
    assert over_forward[1] <= 3
    assert memory["compile"] <= 2 * dense
