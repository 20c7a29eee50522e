"""All figures of Innocenti and Achour at the paper's scale: ``python -m icl_lib.experiments --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from icl_lib.experiments.every_block import EveryBlockSettings
from icl_lib.experiments.paper_scale import paper_settings, write_figures

PAPER, TRIAL = Path("_build/figures"), Path("_build/trial")


def main(
    seeds: Annotated[int, typer.Option(help="runs of each setting", min=1)] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="a trial of 5 steps on 8 tasks, kept apart")] = False,
    folder: Annotated[Path | None, typer.Option(help=f"one file a run; {PAPER}, or {TRIAL} for a trial")] = None,
    summary: Annotated[Path | None, typer.Option(help="book/data/every_block.json, or beside a trial's runs")] = None,
    workers: Annotated[int | None, typer.Option(help="local processes; one a core unless given", min=1)] = None,
    dask: Annotated[str | None, typer.Option(help="address of a Dask scheduler, tcp://host:8786")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if this machine has one")] = "auto",
) -> None:
    """Run every setting of the paper's figures for several seeds, and write the summary that the book reads.

    A run that is stopped goes on where it was: start the same command again.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = folder or (TRIAL if quick else PAPER)
    summary = summary or (folder / "summary" / "every_block.json" if quick else Path("book/data/every_block.json"))
    base = EveryBlockSettings(device=device, **({"steps": 5, "tasks": 8} if quick else {}))
    result = write_figures(folder, summary, paper_settings(base, seeds), workers, dask)
    for one in result["runs"]:
        changed = {name: value for name, value in one["settings"].items() if value != getattr(base, name)}
        first, last = (one["experiment"]["median"][step] for step in (0, -1))
        print(
            f"{changed or 'Figure 1'}: test loss {first:.3g} → {'diverged' if last is None else format(last, '.3g')}, "
            f"theory and experiment differ by at most {one['agreement']:.1e}, "
            f"diverged: {len(one['diverged'])} of {len(one['seeds'])}"
        )
    print(f"written to {summary}")


if __name__ == "__main__":
    typer.run(main)
