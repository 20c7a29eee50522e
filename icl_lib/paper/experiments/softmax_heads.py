r"""The heads of softmax attention that He et al. train, in their setting and for several seeds.

Source: He et al. (arXiv 2503.12734); five inputs, forty examples and noise of variance 0.1 are those of their code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from icl_lib.constructions import debiased_descent, descent_loss, head_patterns, noisy_prompts, train_softmax_heads
from icl_lib.paper.sweep import Checkpoint, sweep
from icl_lib.validation import require_size

HEADS = (1, 2, 4)
"""The numbers of heads that are trained."""


@dataclass(frozen=True)
class HeadSettings:
    """What :func:`icl_lib.constructions.train_softmax_heads` takes; the defaults are the paper's, but for training."""

    heads: int = 2
    examples: int = 40
    features: int = 5
    noise: float = 0.1
    steps: int = 4000
    batch: int = 128
    learning_rate: float = 1e-2
    seed: int = 0


def run_softmax_heads(settings: HeadSettings, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Train heads and measure them on 20 000 new prompts, the same for all runs; a run has no checkpoint.

    Returns the ``loss``, that of the layer before training (``untrained``), that of the debiased step at its best rate
    (``step``), and for each head its ``scales``, ``values``, and their shares ``diagonal`` and ``target``.

    >>> result = run_softmax_heads(HeadSettings(examples=4, features=2, steps=2, batch=4))
    >>> sorted(result)
    ['diagonal', 'loss', 'scales', 'step', 'target', 'untrained', 'values']
    """
    trained, untrained = train_softmax_heads(**asdict(settings))
    shape = settings.examples, settings.features, settings.noise
    context, query, target = noisy_prompts(20_000, *shape, torch.Generator().manual_seed(2**31))
    _, rate = descent_loss(*shape)
    predictions = {
        "loss": trained(context, query),
        "untrained": untrained(context, query),
        "step": debiased_descent(context, query, rate),
    }
    losses = {name: (found - target).square().mean().item() for name, found in predictions.items()}
    return losses | {name: numbers.tolist() for name, numbers in vars(head_patterns(trained)).items()}


def head_settings(base: HeadSettings | None = None, seeds: int = 5) -> list[HeadSettings]:
    """Return the settings of all runs: every number of heads for every seed.

    >>> len(head_settings(seeds=2))
    6
    """
    require_size("seeds", seeds)
    given = asdict(base or HeadSettings())
    return [HeadSettings(**{**given, "heads": heads, "seed": seed}) for heads in HEADS for seed in range(seeds)]


def write_softmax_heads(
    folder: str | Path,
    summary: str | Path,
    settings: Sequence[HeadSettings],
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run all settings that have no record in ``folder`` yet, and write all results as JSON for the book.

    Args:
        folder: the folder of the records, one file for each run.
        summary: the file that the book reads.
        settings, workers, progress: as for :func:`icl_lib.paper.sweep.sweep`.
    """
    records = sweep(run_softmax_heads, settings, folder, workers=workers, progress=progress)
    result = {
        "paper": "He et al., arXiv 2503.12734",
        "versions": [dict(one) for one in sorted({tuple(sorted(record["versions"].items())) for record in records})],
        "runs": [{"settings": record["settings"], **_rounded(record["result"])} for record in records],
    }
    Path(summary).parent.mkdir(parents=True, exist_ok=True)
    Path(summary).write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    """Round to four digits, more than a figure shows."""
    return {
        name: [float(f"{one:.4g}") for one in value] if isinstance(value, list) else float(f"{value:.4g}")
        for name, value in result.items()
    }
