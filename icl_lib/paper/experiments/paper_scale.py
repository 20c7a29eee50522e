r"""All runs behind the figures of Innocenti and Achour, over several seeds, and their summary for the book.

Each run is saved when it is done, so a stopped sweep continues where it was; see :mod:`icl_lib.paper.sweep`. The
summary holds medians and quartiles over seeds, with the settings and the versions of the software.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from icl_lib.paper.experiments.every_block import BLOCK_COLUMNS, COLUMNS, EveryBlockSettings, run_every_block
from icl_lib.paper.sweep import sweep
from icl_lib.validation import require_size

VARIED: dict[str, tuple[Any, ...]] = {
    "norm": ("none", "pre"),
    "tasks": (32, 64, 128, 256, 512),
    "length": (51, 101, 1001),
    "features": (2, 5, 8),
}
"""What the figures vary, one setting at a time: the norm (Figure A.3), tasks (A.4), length (A.5), dimension (A.6)."""

ALL = (*COLUMNS, *BLOCK_COLUMNS)

BLOCKS_EVERY = 10
"""Steps between two entries of a block's columns in the summary."""


def paper_settings(
    base: EveryBlockSettings | None = None, seeds: int = 5, varied: dict[str, Sequence[Any]] | None = None
) -> list[EveryBlockSettings]:
    """Return the settings of all runs: for every seed, ``base`` and ``base`` with one setting changed.

    >>> len(paper_settings(seeds=1))
    10
    """
    require_size("seeds", seeds)
    base = base or EveryBlockSettings()
    changed = [replace(base, **{name: value}) for name, values in (varied or VARIED).items() for value in values]
    # Short runs first, so that most of the figures are done early.
    distinct = sorted(dict.fromkeys([base, *changed]), key=lambda one: one.tasks * one.length**2)
    return [replace(one, seed=base.seed + seed) for one in distinct for seed in range(seeds)]


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return medians and quartiles over the seeds of each setting, step by step.

    Unlike a mean, they stay finite if one seed diverges. The result is one dict for each setting (without its seed):

    - ``settings``, ``seeds``, and ``diverged``, the seeds whose training diverged;
    - ``agreement``, the largest relative difference of the theory and experiment losses over steps and seeds;
    - ``worst``, the largest ``error`` and ``second`` over steps, seeds and blocks;
    - for each column its ``steps`` and, at these steps, ``median``, ``low`` and ``high`` (the quartiles), with an inner
      list over blocks; None where it is infinite because of divergence.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        settings = {name: value for name, value in record["settings"].items() if name != "seed"}
        groups[json.dumps(settings)].append(record)
    return [_summary(json.loads(key), group) for key, group in groups.items()]


def _summary(settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    values = {name: np.array([_filled(record["result"][name]) for record in records]) for name in ALL}
    columns = {}
    for name in ALL:
        steps = np.arange(0, settings["steps"], 1 if name in COLUMNS else BLOCKS_EVERY)
        quartiles = np.quantile(values[name][:, steps], (0.25, 0.5, 0.75), axis=0, method="nearest")
        low, median, high = (_rounded(quartile) for quartile in quartiles)
        columns[name] = {"steps": steps.tolist(), "median": median, "low": low, "high": high}
    with np.errstate(invalid="ignore"):  # ∞ − ∞ is NaN where a run diverged, and nanmax leaves it out
        agreement = np.nanmax(np.abs(values["theory"] - values["experiment"]) / values["experiment"])
    return {
        "settings": settings,
        "seeds": [record["settings"]["seed"] for record in records],
        "diverged": [record["settings"]["seed"] for record in records if record["result"]["theory"][-1] is None],
        "agreement": float(agreement),
        "worst": {name: float(values[name][np.isfinite(values[name])].max()) for name in ("error", "second")},
        **columns,
    }


def _filled(column: list[Any]) -> np.ndarray:
    """Return the column with the steps after a divergence as infinity, so that they rank above all other seeds."""
    like = np.full_like(np.array(column[0], dtype=float), np.inf)
    return np.array([like if entry is None else entry for entry in column])


def _rounded(values: Any) -> Any:
    """Round to four digits, more than a figure shows; None replaces numbers that are not finite."""
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def write_figures(
    folder: str | Path,
    summary: str | Path,
    settings: Sequence[EveryBlockSettings],
    workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run all settings that have no record in ``folder`` yet, and write the summary of all as JSON.

    Args:
        folder: the folder of the records, one file for each run.
        summary: the file that the book reads.
        settings, workers, progress: as for :func:`icl_lib.paper.sweep.sweep`.
    """
    records = sweep(run_every_block, settings, folder, workers=workers, progress=progress)
    result = {
        "paper": "Innocenti and Achour, arXiv 2512.11255",
        "defaults": asdict(EveryBlockSettings()),
        "versions": [dict(one) for one in sorted({tuple(sorted(record["versions"].items())) for record in records})],
        "runs": summarise(records),
    }
    Path(summary).parent.mkdir(parents=True, exist_ok=True)
    Path(summary).write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result
