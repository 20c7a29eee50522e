r"""All runs behind the figures of Innocenti and Achour, over several seeds, and their summary for the book.

A run is kept as soon as it is done, so a stopped sweep goes on where it was; see :mod:`icl_lib.sweep`. The summary is
small: medians and quartiles over seeds, with the settings and versions that made them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from icl_lib.experiments.every_block import BLOCK_COLUMNS, COLUMNS, EveryBlockSettings, run_every_block
from icl_lib.sweep import sweep
from icl_lib.validation import require_size

VARIED: dict[str, tuple[Any, ...]] = {
    "norm": ("none", "pre"),
    "tasks": (32, 64, 128, 256, 512),
    "length": (51, 101, 1001),
    "features": (2, 5, 8),
}
"""What the figures vary, one at a time: Figure A.3 the norm, A.4 the tasks, A.5 the length, A.6 the dimension."""

ALL = (*COLUMNS, *BLOCK_COLUMNS)

BLOCKS_EVERY = 10
"""Steps between two entries of what the summary keeps for each block."""


def paper_settings(
    base: EveryBlockSettings | None = None, seeds: int = 5, varied: dict[str, Sequence[Any]] | None = None
) -> list[EveryBlockSettings]:
    """The settings of all runs, each once: ``base``, and with one of them varied, for every seed.

    >>> len(paper_settings(seeds=1))
    10
    """
    require_size("seeds", seeds)
    base = base or EveryBlockSettings()
    changed = [replace(base, **{name: value}) for name, values in (varied or VARIED).items() for value in values]
    # Short runs first: most of the figures are there early.
    distinct = sorted(dict.fromkeys([base, *changed]), key=lambda one: one.tasks * one.length**2)
    return [replace(one, seed=base.seed + seed) for one in distinct for seed in range(seeds)]


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median and quartiles over the seeds of each setting, step by step: a seed that diverges must not hide the others.

    Returns one dict for each setting, without its seed: ``settings``, ``seeds``, ``diverged`` (the seeds that did),
    ``agreement`` (the largest relative difference of the theory and experiment losses over steps and seeds), ``worst``
    (the largest ``error`` and ``second`` of all), and for each column its ``steps``, and over them ``median``, ``low``
    and ``high`` (the quartiles), with an inner list over blocks; None where training had diverged.
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
    with np.errstate(invalid="ignore"):  # ∞ − ∞ where a run diverged, which nanmax leaves out
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
    """Steps after a divergence count as infinite: larger than what any other seed has there."""
    like = np.full_like(np.array(column[0], dtype=float), np.inf)
    return np.array([like if entry is None else entry for entry in column])


def _rounded(values: Any) -> Any:
    """Four digits, which is more than a figure shows, and None for a number that is not there."""
    if values.ndim:
        return [_rounded(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def write_figures(
    folder: str | Path,
    summary: str | Path,
    settings: Sequence[EveryBlockSettings],
    workers: int | None = None,
    dask: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Run all settings that are not in ``folder`` yet, and write their summary as JSON.

    Args:
        folder: one file for each run.
        summary: the file for the book.
        settings, workers, dask, progress: as for :func:`icl_lib.sweep.sweep`.
    """
    records = sweep(run_every_block, settings, folder, workers=workers, dask=dask, progress=progress)
    result = {
        "paper": "Innocenti and Achour, arXiv 2512.11255",
        "defaults": asdict(EveryBlockSettings()),
        "versions": [dict(one) for one in sorted({tuple(sorted(record["versions"].items())) for record in records})],
        "runs": summarise(records),
    }
    Path(summary).parent.mkdir(parents=True, exist_ok=True)
    Path(summary).write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result
