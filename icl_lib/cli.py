"""``python -m icl_lib``: verify the identity on a language model, save a prompt as an adapter, write a report.

Exit codes: 0 if the identity holds; 1 if it fails, or if the prompt changes nothing, so that nothing was tested; 2 for
wrong usage, for a model that cannot be loaded in full, and if a file would be overwritten without ``--overwrite``.
"""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import icl_lib
from icl_lib.environment import extra
from icl_lib.models.absorb import absorb as absorb_prompt
from icl_lib.models.lora import model_file, require_folder, require_free
from icl_lib.models.report import Report
from icl_lib.models.text import tokens_of
from icl_lib.models.verify import verify as verify_prompt

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
DTYPES = ("float64", "float32", "bfloat16", "float16")

Model = Annotated[str, typer.Option(help="a folder with a model in safetensors, or a name on the Hugging Face hub")]
Prompt = Annotated[str | None, typer.Option(help="the text that the edits replace")]
Query = Annotated[str | None, typer.Option(help="the text that remains")]
PromptIds = Annotated[str | None, typer.Option(help="token ids instead of --prompt, for example '5 3 8'")]
QueryIds = Annotated[str | None, typer.Option(help="token ids instead of --query")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: all devices found")]
Dtype = Annotated[str, typer.Option(help=f"precision: {', '.join(DTYPES)}")]
Outer = Annotated[str | None, typer.Option(help="which weights add the change of the stream: down, bias or scale")]
Joint = Annotated[bool, typer.Option("--joint", help="one edit of each map for all positions of the query")]
Tolerance = Annotated[float | None, typer.Option(help="the largest relative error for which the identity holds")]
Progress = Annotated[bool, typer.Option("--progress", help="show a progress bar over blocks")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what an earlier run wrote there")]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]


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
    """Replace the prompt of a language model by edits of its weights, exactly."""


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
    joint: Joint = False,
    tolerance: Tolerance = None,
    progress: Progress = False,
    json: Json = False,
) -> None:
    """Check that the edited model outputs for the query alone what the model outputs for the whole prompt."""
    with usage_errors():
        loaded, ids, context_length = load(model, device, dtype, prompt, query, prompt_ids, query_ids)
        report = verify_prompt(
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=joint, progress=progress
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
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=True, progress=progress
        )
        if found.holds:
            patch = absorb_prompt(loaded, ids, context_length, outer=outer, progress=progress)
            patch.to_lora(output, loaded, overwrite=overwrite)
    typer.echo(found.to_json(indent=2) if json else str(found))
    last = ids.shape[1] - 1
    told = f"written to {output}; call the model with the query at the positions {context_length} to {last}"
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
            loaded, ids, context_length, tolerance=tolerance, outer=outer, joint=joint, progress=progress
        )
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            found.to_json(indent=2) + "\n" if output.suffix == ".json" else page(found, model), encoding="utf-8"
        )
    typer.echo(f"written to {output}")
    raise typer.Exit(_status(found))


def _status(found: Report) -> int:
    return 0 if found.holds and found.tested else 1


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Print errors of usage without a traceback and exit with 2."""
    try:
        yield
    except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def require_free_file(output: Path, overwrite: bool) -> None:
    """Require that a report written to ``output`` damages nothing: no file is there, or ``overwrite`` is true.

    A folder that holds a model is refused in any case.
    """
    if output.suffix not in (".json", ".html"):
        raise ValueError(f"--output is {output}: give a name that ends in .json or .html.")
    require_folder("the folder of --output", output.parent)
    found = model_file(output.parent)
    if found is not None:
        raise ValueError(
            f"--output is {output}, in a folder that holds a model ({found}): give a file in another folder."
        )
    if output.is_dir():
        raise ValueError(f"--output is {output}, which is a folder: give the name of a file.")
    if output.exists() and not overwrite:
        raise ValueError(f"--output is {output}, which exists: give another name, or --overwrite to replace it.")


def load(
    name: str,
    device: str,
    dtype: str,
    prompt: str | None,
    query: str | None,
    prompt_ids: str | None,
    query_ids: str | None,
) -> tuple[nn.Module, Tensor, int]:
    """Return the model, the token ids of prompt and query ``[1, n]``, and the number of tokens of the prompt.

    A folder is read without the network. Weights are read from safetensors only, and no code of the model is run.
    Raises `ValueError` if the weights do not fit the model: transformers fills in random numbers for a missing tensor,
    and the identity would hold for them too.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype}: choose one of {', '.join(DTYPES)}.")
    if not Path(name).is_dir() and (Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"--model is {name}: there is no such folder.")
    with extra("llm"):
        from safetensors import SafetensorError
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    logging.disable_progress_bar()
    try:
        AutoConfig.from_pretrained(name, **_source(name))
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"--model is {name}: it comes with its own code, and this command runs no code of a model. Load it in "
                "Python and call icl_lib.verify."
            ) from None
        raise ValueError(
            f"--model is {name}: neither a folder with a model nor a model on the hub. Give a folder that "
            f"save_pretrained wrote, or a name such as openai-community/gpt2. {_told(error)}"
        ) from None
    before, after = _both_ids(name, prompt, query, prompt_ids, query_ids)
    device_map = "auto" if device == "auto" else _device(device)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # `_require_complete` names the tensors, transformers' own error does not
            output_loading_info=True,
            **_source(name),
        )
    except SafetensorError as error:
        raise ValueError(
            f"--model is {name}: its weights cannot be read. Copy or download its files again. {_told(error)}"
        ) from None
    except (OSError, ValueError) as error:
        if "safetensors" in str(error):
            raise ValueError(
                f"--model is {name}: it has no weights in safetensors, and weights in pickles (such as "
                "pytorch_model.bin) are not read, because a pickle can run code. If you trust them, load them in "
                f"Python and call model.save_pretrained. {_told(error)}"
            ) from None
        raise ValueError(f"--model is {name}: it is not a causal language model that loads. {_told(error)}") from None
    _require_complete(name, found)
    model.eval().requires_grad_(False)
    ids = torch.tensor([before + after], device=model.get_input_embeddings().weight.device)
    return model, ids, len(before)


def _require_complete(name: str, found: dict[str, Any]) -> None:
    """Require that the weights of the model ``name`` are all there and fit; ``found`` is transformers' loading info."""
    problems = (
        ("missing_keys", "its files lack", "which transformers fills with random numbers"),
        ("mismatched_keys", "its files hold in another shape", "which transformers fills with random numbers"),
        ("unexpected_keys", "its files hold", "for which the model has no place"),
    )
    for kind, what, so in problems:
        names = sorted(key if isinstance(key, str) else key[0] for key in found[kind])
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"--model is {name}: {what} {names[0]}{more}, {so}. Give a model whose config.json and weights belong "
                "together, as save_pretrained writes them."
            )


def _both_ids(
    model: str, prompt: str | None, query: str | None, prompt_ids: str | None, query_ids: str | None
) -> tuple[list[int], list[int]]:
    """Return the token ids of prompt and query: two texts are tokenised together."""
    for name, text, ids in (("prompt", prompt, prompt_ids), ("query", query, query_ids)):
        if (text is None) == (ids is None):
            raise ValueError(f"give either --{name} or --{name}-ids.")
    if (prompt is None) != (query is None):
        raise ValueError("give prompt and query both as texts or both as token ids: they are tokenised together.")
    if prompt is None:
        return _numbers("prompt", prompt_ids), _numbers("query", query_ids)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **_source(model))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model} has no tokenizer that can be loaded: give --prompt-ids and --query-ids. {_told(error)}"
        ) from None
    try:
        ids, split = tokens_of(tokenizer, prompt, query)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(
            f"--prompt and --query are {prompt + query!r}, which the tokenizer cannot encode: give a text in its "
            f"vocabulary, or --prompt-ids and --query-ids. {_told(error)}"
        ) from None
    before, after = ids[:split], ids[split:]
    typer.echo(
        f"the model reads {len(before)} tokens of prompt, {tokenizer.decode(before)!r}, and {len(after)} of query, "
        f"{tokenizer.decode(after)!r}",
        err=True,
    )
    return before, after


def _numbers(name: str, ids: str) -> list[int]:
    try:
        found = [int(part) for part in ids.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--{name}-ids is {ids!r}: give whole numbers separated by spaces.") from None
    if not found:
        raise ValueError(f"--{name}-ids holds no token: give one or more token ids.")
    return found


def _source(name: str) -> dict[str, Any]:
    return {"local_files_only": Path(name).is_dir(), "trust_remote_code": False}


def _device(device: str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device is {device}: give cpu, cuda, mps or auto. {_told(error)}") from None
    return found


def _told(error: Exception) -> str:
    """Return all that an error of another library says."""
    return f"The error was: {str(error).strip() or type(error).__name__}"


def page(report: Report, model: str) -> str:
    """Return the report as a self-contained page of HTML."""
    title = html.escape(f"A prompt as weights: {model}")
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td,th{padding:.2rem .8rem}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{report._repr_html_()}</html>\n"
    )
