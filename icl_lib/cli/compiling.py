"""``python -m icl_lib compile``: turn a prompt and a file of queries into an adapter, and say how well it carries."""

from __future__ import annotations

import json as to_json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from icl_lib.cli.loading import (
    Device,
    Dtype,
    Json,
    Model,
    Outer,
    Overwrite,
    Progress,
    load_model,
    page_of,
    require_free_file,
    split_ids,
    tokenizer_of,
    usage_errors,
)
from icl_lib.models.compiler import compile_prompt
from icl_lib.models.held_out import held_out
from icl_lib.models.lora import require_free

Queries = list[Tensor]
_Pairs = tuple[Queries, Queries | None]
NO_IDS = "so give other texts"


def compile_to_adapter(
    model: Model,
    output: Annotated[Path, typer.Option(help="the folder for the adapter")],
    queries: Annotated[Path, typer.Option(help="a file with a query on each line; behind a tab, what follows it")],
    prompt_file: Annotated[Path | None, typer.Option(help="a file with the text that the edits replace")] = None,
    system_file: Annotated[
        Path | None, typer.Option(help="a file with a system prompt: the model's chat template is used")
    ] = None,
    evaluate: Annotated[
        Path | None, typer.Option(help="a file with other queries; behind a tab, the right answer")
    ] = None,
    guard: Annotated[
        Path | None, typer.Option(help="a file with an unrelated text on each line, which the edits should leave alone")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="a file for the measurements, .json or .html")] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            help="first tokens of the prompt that stay in front of every query; by default 1, with --system-file those "
            "that the chat template writes before the system prompt",
            show_default=False,
        ),
    ] = None,
    ridge: Annotated[float, typer.Option(help="strength of the ridge; 0 for edits that are exact on the queries")] = 1,
    rank: Annotated[int | None, typer.Option(help="the largest rank of an edit")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    outer: Outer = None,
    overwrite: Overwrite = False,
    progress: Progress = False,
    json: Json = False,
) -> None:
    """Turn a prompt and some queries into one LoRA adapter that also serves other queries.

    The adapter is for queries right behind the kept tokens, at the positions that generate gives them. It is a fit:
    measure it with --evaluate.
    """
    with usage_errors():
        require_free("--output", output, overwrite, "--overwrite")
        if report is not None:
            require_free_file(report, overwrite)
        if (prompt_file is None) == (system_file is None):
            raise ValueError("give either --prompt-file or --system-file.")

        def read() -> tuple[Any, Tensor, int, _Pairs, _Pairs | None, Queries | None]:
            tokenizer = tokenizer_of(model, "compile needs one")
            texts = _Texts(tokenizer, prompt_file or system_file, chat=system_file is not None)
            first = texts.of("--queries", queries)
            other = None if evaluate is None else texts.of("--evaluate", evaluate)
            unrelated = None if guard is None else texts.alone("--guard", guard)
            return tokenizer, texts.prompt, texts.opening() if keep is None else keep, first, other, unrelated

        loaded, (tokenizer, prompt, kept, calibration, asked, alone) = load_model(model, device, dtype, read)
        at = loaded.get_input_embeddings().weight.device
        prompt, calibration = prompt.to(at), _moved(calibration, at)
        patch = compile_prompt(
            loaded,
            prompt,
            calibration[0],
            kept,
            ridge,
            rank,
            calibration[1],
            guard=alone and [text.to(at) for text in alone],
            start=kept,
            outer=outer,
            progress=progress,
        )
        found = None if asked is None else held_out(patch, loaded, prompt, *_moved(asked, at))
        patch.to_lora(output, loaded, overwrite=overwrite)
        measured = {
            "model": model,
            "prompt_tokens": len(prompt),
            "kept": tokenizer.decode(prompt[:kept]),
            "calibration_queries": patch.queries,
            "exact_on_them": patch.is_exact,
            "largest_error_on_them": max(float(fit.error.max()) for fit in patch.fits),
            "largest_condition": max((max(fit.conditions.values(), default=1.0) for fit in patch.fits), default=1.0),
            "held_out": None if found is None else found.to_dict(),
        }
        if report is not None:
            report.parent.mkdir(parents=True, exist_ok=True)
            text = to_json.dumps(measured, indent=2) + "\n"
            if report.suffix == ".html":
                text = page_of(f"A prompt compiled into weights: {model}", *([] if found is None else [found]))
            report.write_text(text, encoding="utf-8")
    if json:
        typer.echo(to_json.dumps(measured, indent=2))
    elif found is not None:
        typer.echo(f"{found}\n")
    on_them = "exact on" if patch.is_exact else "fitted to"
    typer.echo(
        f"written to {output}: it replaces {len(prompt) - kept} tokens of the prompt and is {on_them} {patch.queries} "
        f"queries. Put {measured['kept']!r} in front of a query, and give no positions."
        + ("" if found else " How well it serves other queries was not measured: give --evaluate."),
        err=json,
    )


class _Texts:
    """The prompt and queries of the files as token ids, tokenised together."""

    def __init__(self, tokenizer: Any, path: Path, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.text = _read("--system-file" if chat else "--prompt-file", path)
        if chat:
            if not getattr(tokenizer, "chat_template", None):
                raise ValueError("--system-file needs a chat template, and the tokenizer has none: give --prompt-file.")
            self.messages = [{"role": "system", "content": self.text.strip()}]
            self.text = tokenizer.apply_chat_template(self.messages, tokenize=False)
        self.prompt = torch.empty(0, dtype=torch.long)

    def of(self, name: str, path: Path) -> tuple[Queries, Queries | None]:
        """Return the queries of a file, and what follows each behind a tab, if anything does."""
        lines = [line for line in _read(name, path).splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{name} is {path}, which has no query: write one on each line.")
        with_answer = ["\t" in line for line in lines]
        if any(with_answer) != all(with_answer):
            raise ValueError(
                f"{name} is {path}, whose line {with_answer.index(not with_answer[0]) + 1} differs from the first in "
                "having a tab: put an answer behind a tab on every line, or on none."
            )
        found: Queries = []
        answers: Queries = []
        for number, line in enumerate(lines, 1):
            query, _, answer = line.partition("\t")
            text = self._asked(query)
            before, after = split_ids(self.tokenizer, self.text, text, NO_IDS)
            where = f"{name}, line {number}"
            self._same(
                before, self.prompt.tolist() or before, where, "--prompt-file" if not self.chat else "the prompt"
            )
            self.prompt = torch.tensor(before)
            found.append(torch.tensor(after))
            if all(with_answer):
                whole, follows = split_ids(self.tokenizer, self.text + text, answer, NO_IDS)
                self._same(whole, before + after, where, "the query")
                answers.append(torch.tensor(follows))
        return found, answers or None

    def opening(self) -> int:
        """Return how many tokens the chat template writes before the system prompt; without a template, 1."""
        begins = self.text.index(self.messages[0]["content"]) if self.chat else 0
        return len(split_ids(self.tokenizer, self.text[:begins], self.text[begins:], NO_IDS)[0]) if begins else 1

    def alone(self, name: str, path: Path) -> Queries:
        """Return the texts of a file, one a line, each behind the token with which the tokenizer begins a text."""
        lines = [line for line in _read(name, path).splitlines() if line.strip()]
        start = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        bare = (self.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines)
        return [torch.tensor([*start, *ids]) for ids in bare]

    def _asked(self, query: str) -> str:
        if not self.chat:
            return query
        messages = [*self.messages, {"role": "user", "content": query}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        if not text.startswith(self.text):
            raise ValueError(
                "--system-file: with this chat template a conversation does not begin as the system prompt alone does: "
                "write the texts yourself and give --prompt-file."
            )
        return text.removeprefix(self.text)

    def _same(self, ids: list[int], wanted: list[int], where: str, what: str) -> None:
        if ids != wanted:
            raise ValueError(
                f"{where}: here the tokens of {what} are others than on the lines before, because its end is read "
                "together with what follows: move the boundary, for example a space to the beginning of what follows."
            )


def _read(name: str, path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name} is {path}, which cannot be read as a text: {error}") from None
    if not text.strip():
        raise ValueError(f"{name} is {path}, which is empty: give a file with a text.")
    return text


def _moved(texts: _Pairs, device: torch.device) -> _Pairs:
    queries, answers = texts
    return [query.to(device) for query in queries], answers and [answer.to(device) for answer in answers]
