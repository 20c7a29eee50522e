r"""What a verification measured, as an object that prints, draws itself in a notebook and travels as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from icl_lib.measures import relative_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""The relative error up to which the identity is said to hold; :func:`icl_lib.verification.verify` takes another."""


@dataclass(frozen=True)
class Report:
    r"""What :func:`icl_lib.verification.verify` measured. Lists run over blocks, and inside over positions.

    An error is $\lVert T_{\text{patched}} - T(C, x)_i \rVert / \lVert T(C, x)_i \rVert$; the control is the same for
    the block without its edits. A language model is run as a whole, so there it is the stream after the block.

    Attributes:
        model: the name of its class.
        reference: what the patched blocks were fed, see :func:`icl_lib.absorb.absorb`.
        context_length: number of tokens that were replaced.
        first: position of the first entry of the inner lists.
        prompts: number of prompts, over which ``error`` is the largest and ``control`` the smallest.
        dtype: precision of the arithmetic.
        device: where it ran.
        versions: of torch, and of transformers where the model is from there.
        error: relative error of each patched block at each position, ``[blocks][positions]``.
        control: the same without the patch; of a language model at up to 32 of the positions, evenly spread.
        mean_squared_difference: of the outputs of each patched block, over prompts, positions and features.
        output_error: relative error of the whole patched model on the bare query.
        output_control: the same without the patch.
        tolerance: the error up to which the identity is said to hold.
    """

    model: str
    reference: str
    context_length: int
    first: int
    prompts: int
    dtype: str
    device: str
    versions: dict[str, str]
    error: list[list[float]]
    control: list[list[float]]
    mean_squared_difference: list[float]
    output_error: float
    output_control: float
    tolerance: float

    @property
    def max_error(self) -> float:
        """The largest error anywhere, that of the model's output included; infinite where one is not a number."""
        return _largest([*(value for block in self.error for value in block), self.output_error])

    @property
    def holds(self) -> bool:
        """Whether no error is larger than the tolerance."""
        return self.max_error <= self.tolerance

    @property
    def tested(self) -> float:
        """How many blocks and positions, as a share, fail without their edits; where it is 0, nothing was tested."""
        control = [value for block in self.control for value in block]
        return sum(value > self.tolerance for value in control) / len(control)

    def to_dict(self) -> dict[str, Any]:
        """Everything measured, as plain numbers, strings, lists and dictionaries; None for what is not a number."""
        summary = {"max_error": self.max_error, "holds": self.holds, "tested": self.tested}
        return _plain({**asdict(self), **summary})

    def to_json(self, **kwargs: Any) -> str:
        """The same as JSON; the arguments are those of `json.dumps`."""
        return json.dumps(self.to_dict(), allow_nan=False, **kwargs)

    def rows(self) -> list[dict[str, Any]]:
        """One row a block: the largest error and its position, and how far off the block is without its edits.

        Blocks and positions are counted from 1, as in the paper.
        """
        rows = []
        for index, (error, control) in enumerate(zip(self.error, self.control, strict=True)):
            worst = max(range(len(error)), key=lambda position: _largest([error[position]]))
            rows.append(
                {
                    "block": index + 1,
                    "largest error": error[worst],
                    "at position": self.first + worst + 1,
                    "mean squared difference": self.mean_squared_difference[index],
                    "no edit: median": sorted(control)[len(control) // 2],
                    "no edit: smallest": min(control),
                }
            )
        return rows

    def _summary(self) -> tuple[str, str]:
        positions = len(self.error[0])
        return (
            f"{self.model}, {len(self.error)} blocks, {positions} positions, {self.prompts} "
            f"prompt{'s' if self.prompts > 1 else ''}, {self.dtype} on {self.device}, reference: {self.reference}",
            f"Whole model on the bare query: error at most {self.output_error:.1e}; without edits at least "
            f"{self.output_control:.1e}. The identity {'holds' if self.holds else 'FAILS'} to {self.tolerance:.0e}: "
            f"the largest error is {self.max_error:.1e}. Without edits {self.tested:.0%} of blocks and positions fail."
            + ("" if self.tested else " Nothing was tested: the context changes nothing here."),
        )

    def _table(self, form: str) -> str:
        return tabulate(self.rows(), headers="keys", tablefmt=form, floatfmt=".1e")

    def __str__(self) -> str:
        head, verdict = self._summary()
        return f"{head}\n\n{self._table('simple')}\n\n{verdict}"

    def _repr_html_(self) -> str:
        head, verdict = self._summary()
        return (
            f'<div class="icl-report" style="overflow-x:auto"><p>{head}</p>{self._table("html")}<p>{verdict}</p></div>'
        )


def by_prompt(actual: Tensor, expected: Tensor) -> Tensor:
    """The relative distance for each prompt and position, ``[prompts, positions]``."""
    return relative_error(actual, expected).reshape(-1, expected.shape[-2])


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def _largest(values: list[float]) -> float:
    """What is not a number counts as infinite; `max` would overlook it."""
    return max(values) if _finite(values) else math.inf


def _plain(value: Any) -> Any:
    """Numbers that JSON has no word for become None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
