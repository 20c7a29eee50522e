"""Time of a question to SmolLM2: behind the prompt, behind its cached keys and values, and with compiled edits.

Merged edits leave the shapes of the model as they are, so a merged model takes the time of a bare question. The time
does not depend on which tokens a prompt has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tabulate import tabulate

from benchmarks.bench_cost import interleaved, measured_with, quartiles, written
from icl_lib.models.tokens import behind_kept, cache_name, new_cache
from icl_lib.pretrained import smollm2

RESULTS = Path(__file__).resolve().parents[2] / "book" / "data" / "cost_query.json"
LENGTHS, QUESTION, KEEP, ROUNDS = (32, 128, 512, 2048), 8, 2, 7


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    """Collect the rows; once all are there, write the numbers that the book reads."""
    rows: list[dict[str, Any]] = []
    yield rows
    if len(rows) == len(LENGTHS):
        found = {
            **measured_with("icl_lib", "torch", "transformers"),
            "model": "SmolLM2-135M-Instruct in float32",
            "question": QUESTION,
            "keep": KEEP,
            "rounds": ROUNDS,
            "lengths": rows,
        }
        RESULTS.write_text(written(found), encoding="utf-8")


@pytest.mark.parametrize("length", LENGTHS)
def bench_query(benchmark: Any, results: list[dict[str, Any]], capsys: Any, length: int) -> None:
    model, _ = smollm2(torch.float32)
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length + QUESTION))
    prompt, question = ids[:, :length], ids[:, length:]
    places = torch.arange(length, length + QUESTION)
    cache, name = new_cache(model), cache_name(model)
    with torch.no_grad():
        model(prompt, **{name: cache}, use_cache=True, logits_to_keep=1)
    size = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))

    @torch.no_grad()
    def cached() -> torch.Tensor:
        answer = model(question, **{name: cache}, position_ids=places[None], use_cache=True, logits_to_keep=1)
        cache.crop(-QUESTION)  # for the next question
        return answer.logits

    @torch.no_grad()
    def whole() -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    bare = behind_kept(torch.cat([prompt[:, :KEEP], question], dim=1), torch.cat([torch.arange(KEEP), places]))

    @torch.no_grad()
    def edited() -> torch.Tensor:
        return model(**bare, use_cache=False, logits_to_keep=1).logits

    torch.testing.assert_close(cached(), whole(), rtol=1e-3, atol=1e-3)
    assert (edited() - whole()).abs().max() > 0.1  # without the edits
    seconds = interleaved(benchmark, {"prompt": whole, "cache": cached, "edited": edited}, ROUNDS)
    row = {
        "length": length,
        "cache bytes": size,
        "seconds": {way: quartiles(values) for way, values in seconds.items()},
    }
    benchmark.extra_info.update(row)
    results.append(row)
    with capsys.disabled():
        times = {way: f"{1000 * values[1]:.0f} ms" for way, values in row["seconds"].items()}
        print(f"\n\n{tabulate([{'tokens': length, **times, 'cache, MB': size / 1e6}], headers='keys')}\n")
