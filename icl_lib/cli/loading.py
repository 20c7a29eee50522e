"""What the commands share: their options, how a model is loaded, and how an error of usage ends."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from icl_lib.environment import extra
from icl_lib.models.lora import model_file, require_folder
from icl_lib.models.text import tokens_of
from icl_lib.pretrained import smollm2

DTYPES = ("float64", "float32", "bfloat16", "float16")
KNOWN = "smollm2"
"""A name for ``--model`` that needs no folder."""

Model = Annotated[
    str, typer.Option(help="a folder with a model in safetensors, a name on the Hugging Face hub, or smollm2")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: all devices found")]
Dtype = Annotated[str, typer.Option(help=f"precision: {', '.join(DTYPES)}")]
Outer = Annotated[str | None, typer.Option(help="which weights add the change of the stream: down, bias or scale")]
Progress = Annotated[bool, typer.Option("--progress", help="show a progress bar over blocks")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what an earlier run wrote there")]
Json = Annotated[bool, typer.Option("--json", help="print the report as JSON")]


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
    """Return the model, the token ids of prompt and query ``[1, n]``, and the number of tokens of the prompt."""
    model, (before, after) = load_model(
        name, device, dtype, lambda: _both_ids(name, prompt, query, prompt_ids, query_ids)
    )
    ids = torch.tensor([before + after], device=model.get_input_embeddings().weight.device)
    return model, ids, len(before)


def load_model(name: str, device: str, dtype: str, read: Callable[[], Any]) -> tuple[nn.Module, Any]:
    """Return the model, and what ``read`` returns; it is called before the weights are loaded, which takes long.

    A folder is read without the network. Weights are read from safetensors only, and no code of the model is run. The
    name ``smollm2`` stands for :func:`icl_lib.pretrained.smollm2`. Raises `ValueError` if the weights do not fit the
    model: transformers fills in random numbers for a missing tensor, and the identity would hold for them too.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype is {dtype}: choose one of {', '.join(DTYPES)}.")
    if name == KNOWN:
        given = read()
        return smollm2(getattr(torch, dtype))[0].to(_device(device)), given
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
    given = read()
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
    return model.eval().requires_grad_(False), given


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
    tokenizer = tokenizer_of(model, "give --prompt-ids and --query-ids")
    before, after = split_ids(tokenizer, prompt, query, "or --prompt-ids and --query-ids")
    typer.echo(
        f"the model reads {len(before)} tokens of prompt, {tokenizer.decode(before)!r}, and {len(after)} of query, "
        f"{tokenizer.decode(after)!r}",
        err=True,
    )
    return before, after


def tokenizer_of(model: str, remedy: str) -> Any:
    """Return the tokenizer of a model; ``remedy`` says what to do if it has none."""
    with extra("llm"):
        from transformers import AutoTokenizer
    if model == KNOWN:
        return smollm2()[1]
    try:
        return AutoTokenizer.from_pretrained(model, **_source(model))
    except (OSError, ValueError) as error:
        raise ValueError(f"{model} has no tokenizer that can be loaded: {remedy}. {_told(error)}") from None


def split_ids(tokenizer: Any, before: str, after: str, remedy: str) -> tuple[list[int], list[int]]:
    """Return the token ids of two texts that are tokenised together; ``remedy`` ends the error if they cannot be."""
    try:
        ids, split = tokens_of(tokenizer, before, after)
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise ValueError(
            f"--prompt and --query are {before + after!r}, which the tokenizer cannot encode: give a text in its "
            f"vocabulary, {remedy}. {_told(error)}"
        ) from None
    return ids[:split], ids[split:]


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


def page_of(title: str, *reports: Any) -> str:
    """Return reports as a self-contained page of HTML."""
    title = html.escape(title)
    style = "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}td,th{padding:.2rem .8rem}"
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title><style>{style}</style>'
        f"<h1>{title}</h1>{''.join(report._repr_html_() for report in reports)}</html>\n"
    )
