"""``python -m icl_lib``: verify the identity on a language model, save a prompt as an adapter, write a report.

Exit codes: 0 if the identity holds, or a prompt was compiled; 1 if the identity fails, or if the prompt changes
nothing, so that nothing was tested; 2 for wrong usage, for a model that cannot be loaded in full, and if a file would
be overwritten without ``--overwrite``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import icl_lib
from icl_lib.cli.compiling import compile_to_adapter
from icl_lib.cli.loading import (
    Device,
    Dtype,
    Json,
    Model,
    Outer,
    Overwrite,
    Progress,
    load,
    page_of,
    require_free_file,
    usage_errors,
)
from icl_lib.models.absorb import absorb as absorb_prompt
from icl_lib.models.lora import require_free
from icl_lib.models.report import Report
from icl_lib.models.verify import verify as verify_prompt

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Prompt = Annotated[str | None, typer.Option(help="the text that the edits replace")]
Query = Annotated[str | None, typer.Option(help="the text that remains")]
PromptIds = Annotated[str | None, typer.Option(help="token ids instead of --prompt, for example '5 3 8'")]
QueryIds = Annotated[str | None, typer.Option(help="token ids instead of --query")]
Keep = Annotated[int, typer.Option(help="first tokens of the prompt that stay in front of the query")]
Joint = Annotated[bool, typer.Option("--joint", help="one edit of each map for all positions of the query")]
Tolerance = Annotated[float | None, typer.Option(help="the largest relative error for which the identity holds")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"icl_lib {icl_lib.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """Replace the prompt of a language model by edits of its weights."""


@app.command()
def verify(
    model: Model,
    prompt: Prompt = None,
    query: Query = None,
    prompt_ids: PromptIds = None,
    query_ids: QueryIds = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    outer: Outer = None,
    keep: Keep = 0,
    joint: Joint = False,
    tolerance: Tolerance = None,
    progress: Progress = False,
    json: Json = False,
) -> None:
    """Check that the edited model outputs for the query alone what the model outputs for the whole prompt."""
    with usage_errors():
        loaded, ids, context_length = load(model, device, dtype, prompt, query, prompt_ids, query_ids)
        report = verify_prompt(
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=joint, progress=progress, keep=keep
        )
    typer.echo(report.to_json(indent=2) if json else str(report))
    raise typer.Exit(_status(report))


@app.command()
def absorb(
    model: Model,
    output: Annotated[Path, typer.Option(help="the folder for the adapter")],
    prompt: Prompt = None,
    query: Query = None,
    prompt_ids: PromptIds = None,
    query_ids: QueryIds = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    outer: Outer = None,
    keep: Keep = 0,
    tolerance: Tolerance = None,
    overwrite: Overwrite = False,
    progress: Progress = False,
    json: Json = False,
) -> None:
    """Save the prompt as a LoRA adapter for this query, in the format of peft.PeftModel.from_pretrained.

    The identity is verified first, with one edit of each map for the whole query. If it fails, nothing is written.
    A folder that holds a model is refused.
    """
    with usage_errors():
        require_free("--output", output, overwrite, "--overwrite")
        loaded, ids, context_length = load(model, device, dtype, prompt, query, prompt_ids, query_ids)
        found = verify_prompt(
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=True, progress=progress, keep=keep
        )
        if found.holds:
            patch = absorb_prompt(loaded, ids, context_length, outer=outer, progress=progress, keep=keep)
            patch.to_lora(output, loaded, overwrite=overwrite)
    typer.echo(found.to_json(indent=2) if json else str(found))
    last = ids.shape[1] - 1
    kept = "" if not keep else f"the first {keep} token{'s' * (keep > 1)} of the prompt, then "
    told = f"written to {output}; call the model with {kept}the query at the positions {context_length} to {last}"
    typer.echo(told if found.holds else "nothing was written", err=json)
    raise typer.Exit(_status(found))


@app.command()
def report(
    model: Model,
    output: Annotated[Path, typer.Option(help="a file whose name ends in .json or .html")],
    prompt: Prompt = None,
    query: Query = None,
    prompt_ids: PromptIds = None,
    query_ids: QueryIds = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    outer: Outer = None,
    keep: Keep = 0,
    joint: Joint = False,
    tolerance: Tolerance = None,
    overwrite: Overwrite = False,
    progress: Progress = False,
) -> None:
    """Write the measurements of verify to a file, as JSON or HTML."""
    with usage_errors():
        require_free_file(output, overwrite)
        loaded, ids, context_length = load(model, device, dtype, prompt, query, prompt_ids, query_ids)
        found = verify_prompt(
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=joint, progress=progress, keep=keep
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            found.to_json(indent=2) + "\n"
            if output.suffix == ".json"
            else page_of(f"A prompt as weights: {model}", found),
            encoding="utf-8",
        )
    typer.echo(f"written to {output}")
    raise typer.Exit(_status(found))


def _status(found: Report) -> int:
    return 0 if found.holds and found.tested else 1


app.command("compile")(compile_to_adapter)
