"""The puzzle with a hidden rule: examples that move from the prompt into the weights of a language model."""

from __future__ import annotations

import functools
import html
import inspect
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from icl_lib.environment import building_book
from icl_lib.widgets.page import STATIC, module, page_html

MODEL = Path(__file__).resolve().parents[1] / "paper" / "hidden_rule" / "hidden_rule.safetensors"
NUMBER = "(?:0|[1-9][0-9]?)"
EXAMPLE, QUESTION = (rf"{NUMBER}\+{NUMBER}={NUMBER}", "2+3=10"), (rf"{NUMBER}\+{NUMBER}", "2+8")
MOST_EXAMPLES = 6
STATE = ("examples", "question", "serves")


def _sum(name: str, text: Any, kind: tuple[str, str]) -> str:
    """A sum of this kind, a pattern and an example of it, without spaces."""
    pattern, example = kind
    found = re.sub(r"\s", "", text) if isinstance(text, str) else ""
    if not re.fullmatch(pattern, found):
        raise ValueError(
            f"{name} is {text!r}: write it as {example!r}, with whole numbers from 0 to 99 without leading zeros."
        )
    return found


def _examples(name: str, given: Any) -> str:
    texts = [text for text in given.split(",") if text.strip()] if isinstance(given, str) else []
    if not 1 <= len(texts) <= MOST_EXAMPLES:
        raise ValueError(f"{name} is {given!r}: give 1 to {MOST_EXAMPLES}, such as '2+3=10, 4+2=12'.")
    return ", ".join(_sum(f"{name}[{i}]", text, EXAMPLE) for i, text in enumerate(texts))


def _questions(name: str, given: Any) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name} is {given!r}: give a list of questions, such as ['2+8'].")
    questions = [_sum(f"{name}[{i}]", text, QUESTION) for i, text in enumerate(given)]
    twice = [question for i, question in enumerate(questions) if question in questions[:i]]
    if twice:
        raise ValueError(f"{name} has {twice[0]!r} twice: give each question once.")
    return questions


class _Checked(traitlets.TraitType):
    """A value that a function of the name and the value checks and puts into its one form."""

    def __init__(self, check: Callable[[str, Any], Any]) -> None:
        super().__init__()
        self.check = check

    def validate(self, obj: Any, value: Any) -> Any:
        return self.check(self.name, value)


class Puzzle(anywidget.AnyWidget):
    r"""The book's small language model, with examples that move from its prompt into its weights and back.

    The model runs in the browser, and so does the theorem. In every block, the edit of the matrices is the smallest one
    with which the model answers the questions of ``serves`` alone as it does after the ``examples``
    (:func:`icl_lib.theorem.joint_weight_update`, for the last token of each question). Its rank is at most the number
    of these questions. The widget shows three answers to ``question``: with the examples, without them, and without
    them by the edited model. For a question that the edit was not made from, the last one is usually another: the
    negative control.

    With a kernel, ``examples``, ``question`` and ``serves`` change when the reader changes something, and ``observe``
    reports it.

    Args:
        examples: one to six solved sums, such as ``"2+3=10, 4+2=12"``.
        question: a sum, such as ``"2+8"``.
        serves: the questions from which the edit is made, each once; without any, the weights are not edited.

    Raises `ValueError` for any other text.

    >>> puzzle = Puzzle(serves=["2+8"])
    >>> puzzle.question, puzzle.serves
    ('2+8', ['2+8'])
    """

    _esm = module("puzzle")
    _css = STATIC / "widgets.css"

    examples = _Checked(_examples).tag(sync=True)
    question = _Checked(functools.partial(_sum, kind=QUESTION)).tag(sync=True)
    serves = _Checked(_questions).tag(sync=True)
    config = traitlets.Dict().tag(sync=True)
    weights = traitlets.Bytes().tag(sync=True)

    def __init__(
        self, examples: str = "2+3=10, 4+2=12, 1+5=12", question: str = "2+8", serves: Sequence[str] = ()
    ) -> None:
        super().__init__(examples=examples, question=question, serves=serves)
        if not building_book():  # a page has the model in a script of its own
            record = MODEL.with_suffix(".json").read_text(encoding="utf-8")
            self.config, self.weights = json.loads(record)["config"], MODEL.read_bytes()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if building_book():
            state = {name: getattr(self, name) for name in STATE}
            fallback = html.escape(f"{self.examples}, {self.question} = ?")
            bundle[0]["text/html"] = page_html("puzzle", state, f'<p class="icl-puzzle">{fallback}</p>')
        return bundle


Puzzle.__signature__ = inspect.Signature(  # the signature that traitlets gives every widget is (*args, **kwargs)
    list(inspect.signature(Puzzle.__init__).parameters.values())[1:]
)
