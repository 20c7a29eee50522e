"""Run the papers' experiments at full scale: ``python -m icl_lib.paper.experiments --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch

from icl_lib.environment import extra
from icl_lib.paper.experiments.every_block import EveryBlockSettings
from icl_lib.paper.experiments.paper_scale import paper_settings, write_figures
from icl_lib.paper.experiments.softmax_heads import HeadSettings, head_settings, write_softmax_heads

with extra("figures", command=__name__ == "__main__"):
    import joblib  # noqa: F401 -- the runs need it, and its absence is named before they start
    import typer

PAPER, TRIAL = Path("_build/figures"), Path("_build/trial")


def main(
    seeds: Annotated[int, typer.Option(help="runs of each setting", min=1)] = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="a short trial in a folder of its own: 5 steps, 8 tasks")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help=f"folder of the records; default {PAPER}, or {TRIAL} with --quick")
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(help="file of the first summary, the other beside it; default book/data/every_block.json"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="processes; default one for each core", min=1)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: the GPU if there is one")] = "auto",
) -> None:
    """Run every setting of the papers' figures for several seeds, and write the summaries that the book reads.

    If it is stopped, start the same command again: it continues where it was.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = folder or (TRIAL if quick else PAPER)
    summary = summary or (folder / "summary" / "every_block.json" if quick else Path("book/data/every_block.json"))
    base = EveryBlockSettings(device=device, **({"steps": 5, "tasks": 8} if quick else {}))
    result = write_figures(folder, summary, paper_settings(base, seeds), workers)
    for one in result["runs"]:
        changed = {name: value for name, value in one["settings"].items() if value != getattr(base, name)}
        first, last = (one["experiment"]["median"][step] for step in (0, -1))
        print(
            f"{changed or 'Figure 1'}: test loss {first:.3g} → {'diverged' if last is None else format(last, '.3g')}, "
            f"theory and experiment differ by at most {one['agreement']:.1e}, "
            f"diverged: {len(one['diverged'])} of {len(one['seeds'])}"
        )
    print(f"written to {summary}")
    short, heads = {"steps": 5} if quick else {}, summary.with_name("softmax_heads.json")
    records = folder.with_name(f"{folder.name}-heads")
    write_softmax_heads(records, heads, head_settings(HeadSettings(**short), seeds), workers)
    print(f"written to {heads}")


if __name__ == "__main__":
    typer.run(main)
