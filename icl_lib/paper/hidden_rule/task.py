r"""If 2+3 = 10, 4+2 = 12 and 1+5 = 12, what is 2+8? Prompts with a hidden rule, as tokens.

A rule $f$ maps two numbers from 1 to 9 to one number. A prompt shows some pairs with their answers, ``a+b=f(a, b)``,
and ends with a pair without an answer. The sign is always ``+``; only the examples show which rule it means. Here the
rule doubles the sum, and the answer is 20.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from icl_lib.validation import place, require_size

FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "a+b": lambda a, b: a + b,
    "2(a+b)": lambda a, b: 2 * (a + b),
    "3(a+b)": lambda a, b: 3 * (a + b),
    "2a+b": lambda a, b: 2 * a + b,
    "a+2b": lambda a, b: a + 2 * b,
    "|a-b|": lambda a, b: abs(a - b),
}
"""The forms of the rules, by name, before a constant is added."""

NEW_FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "3a+b": lambda a, b: 3 * a + b,
    "a+3b": lambda a, b: a + 3 * b,
    "2|a-b|": lambda a, b: 2 * abs(a - b),
    "max(a,b)": lambda a, b: (a + b + abs(a - b)) // 2,
}
"""Forms that training never shows."""


@dataclass(frozen=True)
class Rule:
    """A hidden rule: a form of :data:`FORMS` or :data:`NEW_FORMS` plus a constant.

    >>> rule = Rule("2(a+b)")
    >>> rule(2, 3), rule(4, 2), rule(2, 8)
    (10, 12, 20)
    >>> str(Rule("2a+b", 3)), Rule("2a+b", 3)(1, 2), Rule("2a+b", 3)(2, 1)
    ('2a+b+3', 7, 8)
    """

    form: str
    constant: int = 0

    def __post_init__(self) -> None:
        if self.form not in (known := {**FORMS, **NEW_FORMS}):
            raise ValueError(f"form is {self.form!r}: choose one of {', '.join(known)}.")
        require_size("constant", self.constant, 0)

    def __call__(self, a: Any, b: Any) -> Any:
        return {**FORMS, **NEW_FORMS}[self.form](a, b) + self.constant

    def __str__(self) -> str:
        return f"{self.form}+{self.constant}" if self.constant else self.form


RULES = tuple(Rule(form, constant) for form in FORMS for constant in range(5))
"""All rules of training; prompts draw them with equal probability."""

NEW_RULES = {
    "new constants": tuple(Rule(form, constant) for form in FORMS for constant in (5, 6, 7)),
    "new forms": tuple(Rule(form, constant) for form in NEW_FORMS for constant in range(5)),
}
"""Rules that training never shows, in two groups. None of them is a rule of training under another name."""

PAIRS = torch.cartesian_prod(torch.arange(1, 10), torch.arange(1, 10))
"""``[81, 2]``: the pairs of numbers that a prompt can ask for."""

ANSWERS = torch.stack([rule(*PAIRS.T) for rule in RULES])
"""``[rules, 81]``: the answer of each rule to each pair."""


# The first seed for which 2+8 is held out of the doubled sum, 2+3 and 4+2 are not, and every number that a rule gives
# remains among its answers in training.
HELD_OUT_SEED = 43


def _held_out(seed: int) -> Tensor:
    small, large = torch.triu_indices(9, 9)
    alike = (ANSWERS[:, :, None] == ANSWERS[:, None]).sum(-1).view(-1, 9, 9)
    replaceable = torch.minimum(alike, alike.mT)[:, small, large] > 2  # other pairs of the rule have the same answers
    drawn = torch.rand(replaceable.shape, generator=torch.Generator().manual_seed(seed))
    chosen = drawn.masked_fill(~replaceable, -1).topk(3).indices
    held = torch.zeros_like(alike, dtype=torch.bool)
    rule = torch.arange(len(RULES))[:, None]
    # 2+8 and 8+2 together: under most rules they have the same answer.
    held[rule, small[chosen], large[chosen]] = held[rule, large[chosen], small[chosen]] = True
    return held.flatten(1)


HELD_OUT: Bool[Tensor, "rules pairs"] = _held_out(HELD_OUT_SEED)
"""The pairs ``[rules, 81]`` that training never shows with the rule, neither in an example nor in a query. Three
pairs are held out for each rule, and their mirror images."""
_MOST_EXAMPLES = int((~HELD_OUT).sum(1).min()) - 1


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of prompts: the number $n$ has the id $n$, and the signs follow.

    >>> VOCABULARY.encode("2+3=10, 2+8=").tolist()
    [2, 100, 3, 101, 10, 102, 2, 100, 8, 101]
    >>> VOCABULARY.decode([2, 100, 3, 101, 10, 102])
    '2+3=10, '
    >>> VOCABULARY.encode("2*3=")
    Traceback (most recent call last):
    ValueError: text[1] is '*': write numbers and the signs + = , only, such as '2+3=10, 2+8='.
    """

    numbers: int = 100
    signs: str = "+=,"

    @property
    def size(self) -> int:
        """The number of tokens."""
        return self.numbers + len(self.signs)

    @property
    def tokens(self) -> list[str]:
        """The tokens in the order of their ids."""
        return [*map(str, range(self.numbers)), *self.signs]

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """Return the ids of a text. Spaces separate numbers and are ignored otherwise.

        Raises `ValueError`, with the place, for a symbol that is not a token and for a number that is too large.
        """
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text is {text!r}: give a prompt, such as '2+3=10, 2+8='.")
        ids = {token: index for index, token in enumerate(self.tokens)}
        for found in re.finditer(r"[0-9]+|\S", text):
            if found[0] in ids:
                continue
            if found[0][0] not in "0123456789":
                signs = " ".join(self.signs)
                where = f"text[{found.start()}] is {found[0]!r}"
                raise ValueError(f"{where}: write numbers and the signs {signs} only, such as '2+3=10, 2+8='.")
            raise ValueError(
                f"text[{found.start()}:{found.end()}] is {found[0]}: "
                f"write a whole number from 0 to {self.numbers - 1}, without leading zeros."
            )
        return torch.tensor([ids[token] for token in re.findall(r"[0-9]+|\S", text)])

    def decode(self, ids: Sequence[int] | Int[Tensor, " length"]) -> str:
        """Return the text of ids; raises `ValueError` for an id without a token."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        wrong = (ids < 0) | (ids >= self.size)
        if wrong.any():
            raise ValueError(f"ids{place(wrong)} is {ids[wrong][0]}: give ids from 0 to {self.size - 1}.")
        text = " ".join(self.tokens[index] for index in ids)
        return re.sub(r" ?([+=]) ?", r"\1", text).replace(" ,", ",") + (" " if text.endswith(",") else "")


VOCABULARY = Vocabulary()


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts with the same number of examples.

    Attributes:
        rule: ``[count]``: indices into the rows of ``answers``; by default, into :data:`RULES`.
        pair: ``[count, examples + 1]``: indices into :data:`PAIRS`, of the examples and then of the query.
        answers: ``[rules, 81]``: the answer of each rule to each pair; by default those of the rules of training.
    """

    rule: Int[Tensor, " count"]
    pair: Int[Tensor, "count length"]
    answers: Int[Tensor, "rules pairs"] = ANSWERS

    @property
    def numbers(self) -> Int[Tensor, "count length"]:
        """The rule's answer to each pair; the last is that of the query."""
        return self.answers[self.rule[:, None], self.pair]

    @property
    def answer(self) -> Int[Tensor, " count"]:
        """The right answers to the queries; a number is also its token id."""
        return self.numbers[:, -1]

    @property
    def tokens(self) -> Int[Tensor, "count tokens"]:
        """``[count, 6 · examples + 4]``: the ids up to the last ``=``."""
        return self.answered[:, :-1]

    @property
    def answered(self) -> Int[Tensor, "count tokens"]:
        """The ids with the answer to the query at the end."""
        plus, equals, comma = (torch.full_like(self.pair, VOCABULARY.numbers + sign) for sign in range(3))
        first, second = PAIRS[self.pair].unbind(-1)
        return torch.stack([first, plus, second, equals, self.numbers, comma], dim=-1).flatten(1)[:, :-1]

    @property
    def context_length(self) -> int:
        """The number of tokens of the examples, with the comma after the last one."""
        return 6 * (self.pair.shape[1] - 1)

    @property
    def ends(self) -> list[int]:
        """The number of tokens up to the end of each example, with its comma."""
        return list(range(6, self.context_length + 1, 6))

    def by(self, rule: Int[Tensor, " count"]) -> Prompts:
        """Return the same pairs in the same order with another rule."""
        return replace(self, rule=rule)


def sample_prompts(count: int, examples: int, seed: int | torch.Generator, query: str = "training") -> Prompts:
    """Draw prompts: a rule, and pairs without repetition, with equal probabilities.

    >>> prompts = sample_prompts(count=4, examples=2, seed=0, query="held out")
    >>> prompts.tokens.shape, prompts.context_length
    (torch.Size([4, 16]), 12)
    >>> bool(HELD_OUT[prompts.rule, prompts.pair[:, -1]].all())
    True

    Args:
        query: ``training`` for pairs that training can show with the rule, ``held out`` for pairs that it never shows
            with it. The examples are always of the first kind.
    """
    require_size("count", count)
    require_size("examples", examples, 0)
    if examples > _MOST_EXAMPLES:
        raise ValueError(
            f"examples is {examples}, but there are pairs for {_MOST_EXAMPLES} examples and a query only: give at most "
            f"{_MOST_EXAMPLES}."
        )
    if query not in ("training", "held out"):
        raise ValueError(f"query is {query!r}: choose 'training' or 'held out'.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    rule = torch.randint(len(RULES), (count,), generator=generator)
    drawn = torch.rand(count, len(PAIRS), generator=generator)
    pair = drawn.masked_fill(HELD_OUT[rule], -1).topk(examples + 1).indices
    if query == "held out":
        pair[:, -1] = drawn.masked_fill(~HELD_OUT[rule], -1).argmax(1)
    return Prompts(rule, pair)
