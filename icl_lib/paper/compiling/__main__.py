"""Compare compiled prompts with other ways to replace a prompt: ``python -m icl_lib.paper.compiling --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from icl_lib.environment import extra
from icl_lib.paper.compiling.comparison import PARTS, comparisons, write_comparison
from icl_lib.paper.compiling.tasks import TASKS

with extra("figures", command=__name__ == "__main__"):
    import joblib  # noqa: F401 -- the runs need it, and its absence is named before they start
    import typer


def main(
    seeds: Annotated[int, typer.Option(help="runs of each task and method of the main comparison", min=1)] = 3,
    tasks: Annotated[int, typer.Option(help="the first tasks only", min=1, max=len(TASKS))] = len(TASKS),
    part: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PARTS)}; by default all")] = None,
    folder: Annotated[Path, typer.Option(help="folder of the records")] = Path("_build/compiling"),
    summary: Annotated[Path, typer.Option(help="file of the summary")] = Path("book/data/compiling.json"),
    workers: Annotated[int, typer.Option(help="processes, with 1 GB each", min=1)] = 1,
) -> None:
    """Run every method on every task for several seeds, and write the summary that the book reads.

    If it is stopped, start the same command again: it continues where it was. With --part, the rest of the summary
    stays as it is.
    """
    settings = comparisons(list(TASKS)[:tasks], range(1, seeds + 1), part or tuple(PARTS))
    result = write_comparison(folder, summary, settings, workers)
    for one in result["runs"]:
        print(f"{one['settings']}: right {one['accuracy']}, KL {one['kl']}, {one['seconds']} s")
    print(f"written to {summary}")


if __name__ == "__main__":
    typer.run(main)
