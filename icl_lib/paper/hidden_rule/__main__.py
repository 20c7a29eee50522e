"""Train the language model of the book, or write the trained one: ``python -m icl_lib.paper.hidden_rule --help``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from icl_lib.environment import extra
from icl_lib.models.lora import require_free
from icl_lib.paper.hidden_rule.checkpoint import DATA, export, save_hidden_rule
from icl_lib.paper.hidden_rule.training import HiddenRuleSettings, train_hidden_rule
from icl_lib.paper.sweep import Checkpoint

with extra("llm", command=__name__ == "__main__"):
    import transformers  # noqa: F401 -- the model needs it, and its absence is named before anything is written
    import typer

STATE, TRIAL = Path("_build/figures/hidden_rule.pt"), Path("_build/trial")


def main(
    seed: Annotated[int, typer.Option(help="seed of the initial weights and of the prompts")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a trial run of 5 steps, in a folder of its own")] = False,
    folder: Annotated[
        Path | None, typer.Option(help=f"folder of the model; that of this package, or {TRIAL} for a trial")
    ] = None,
    state: Annotated[Path | None, typer.Option(help=f"state file; {STATE}, or in {TRIAL} for a trial")] = None,
    export_to: Annotated[
        Path | None,
        typer.Option("--export", help="train nothing; write the book's model and its tokenizer to this new folder"),
    ] = None,
) -> None:
    """Train the model that finds a hidden rule, in half an hour on one core, and write it with its accuracy.

    To continue a run that was stopped, start the same command again. With --export, write the book's trained model
    instead, as a folder that transformers and `python -m icl_lib verify --model` load.
    """
    if export_to is not None:
        try:
            require_free("--export", export_to, remedy="")
        except ValueError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        print(f"written to {export(export_to)}")
        return
    settings = HiddenRuleSettings(seed=seed, **({"steps": 5} if quick else {}))
    folder, state = folder or (TRIAL if quick else DATA), state or (TRIAL / STATE.name if quick else STATE)
    state.parent.mkdir(parents=True, exist_ok=True)
    record = save_hidden_rule(train_hidden_rule(settings, Checkpoint(state)), folder, count=100 if quick else 4000)
    for row in record["accuracy"]:
        shown = f"{row['examples']} examples, query {row['query']}"
        print(f"{shown}: {row['accuracy']:.1%} right, at best {row['best']:.1%}")
    print(f"written to {folder}")


if __name__ == "__main__":
    typer.run(main)
