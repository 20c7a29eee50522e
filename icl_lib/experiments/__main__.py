"""All figures of Innocenti and Achour at the paper's scale: ``python -m icl_lib.experiments --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from icl_lib.experiments.every_block import EveryBlockSettings
from icl_lib.experiments.paper_scale import figures, paper_settings


def main(
    folder: Annotated[Path, typer.Option(help="one file for each run; a stopped run goes on from here")] = Path(
        "_build/figures"
    ),
    summary: Annotated[Path, typer.Option(help="where the book reads the results")] = Path(
        "book/data/every_block.json"
    ),
    seeds: Annotated[int, typer.Option(help="runs of each setting", min=1)] = 5,
    workers: Annotated[int | None, typer.Option(help="local processes; one a core unless given", min=1)] = None,
    dask: Annotated[str | None, typer.Option(help="address of a Dask scheduler, tcp://host:8786")] = None,
    quick: Annotated[
        bool, typer.Option(help="5 steps on 8 tasks: a trial that takes seconds, not the paper's runs")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU if there is one")] = "auto",
) -> None:
    """Run every setting of the paper's figures for several seeds, and write the summary that the book reads."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    base = EveryBlockSettings(device=device, **({"steps": 5, "tasks": 8} if quick else {}))
    settings = paper_settings(base, seeds)
    result = figures(folder, summary, settings, workers, dask)
    for one in result["runs"]:
        changed = {name: value for name, value in one["settings"].items() if value != result["defaults"][name]}
        loss = one["experiment"]["median"]
        print(
            f"{changed or 'Figure 1'}: test loss {loss[0]:.3g} → {loss[-1]:.3g}, theory and experiment differ by at "
            f"most {one['agreement']:.1e}, diverged: {len(one['diverged'])} of {len(one['seeds'])}"
        )
    print(f"written to {summary}")


if __name__ == "__main__":
    typer.run(main)
