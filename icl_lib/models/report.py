r"""The result of a verification: it prints as a table, shows as HTML in a notebook, and is written as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate

from icl_lib.measures import scientific

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
"""The largest relative error for which the identity holds, by precision; see :func:`icl_lib.models.verify.verify`."""


@dataclass(frozen=True)
class Report:
    r"""The measurements of :func:`icl_lib.models.verify.verify`. Nested lists are indexed by block, then by position.

    An error is $\lVert T_{\text{patched}} - T(C, x)_i \rVert / \lVert T(C, x)_i \rVert$. Its control is the same
    quantity without edits. The model is run as a whole, so the error of a block is that of the stream after it.

    Attributes:
        model: the name of the model's class.
        reference: the input of the patched blocks, see :func:`icl_lib.models.absorb.absorb`.
        context_length: the number of tokens of the context, which the edits replace except for those that are kept.
        keep: the number of first tokens that stay in front of the query, also in the control.
        first: the position of the first entry of the inner lists.
        prompts: the number of prompts; ``error`` is the largest over them and ``control`` the smallest.
        dtype: the precision of the arithmetic.
        device: the device it ran on.
        versions: the versions of torch, and of transformers for a model from there.
        error: the relative error of each patched block at each position, ``[blocks][positions]``.
        control: the same without the patch; with reference ``self`` at up to 32 of the positions, evenly spread.
        mean_squared_difference: for each patched block, the mean squared difference of its output from the output with
            the context, over prompts, positions and features.
        output_error: the relative error of the whole patched model on the bare query.
        output_control: the same without the patch.
        tolerance: the largest error for which the identity holds.
        cause: if rounding does not explain the error, why the identity may fail, as far as probing the model tells.
    """

    model: str
    reference: str
    context_length: int
    keep: int
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
    cause: str = ""

    @property
    def max_error(self) -> float:
        """The largest error of all blocks, positions and the model's output; infinite if one of them is NaN."""
        return _largest([*(value for block in self.error for value in block), self.output_error])

    @property
    def holds(self) -> bool:
        """Whether every error is at most the tolerance."""
        return self.max_error <= self.tolerance

    @property
    def tested(self) -> float:
        """The share of blocks and positions that fail without their edits; if it is 0, the check tested nothing."""
        control = [value for block in self.control for value in block]
        return sum(value > self.tolerance for value in control) / len(control)

    def to_dict(self) -> dict[str, Any]:
        """Return all measurements as plain numbers, strings, lists and dictionaries; None for NaN and infinity."""
        summary = {"max_error": self.max_error, "holds": self.holds, "tested": self.tested}
        return _plain({**asdict(self), **summary})

    def to_json(self, **kwargs: Any) -> str:
        """Return the dictionary of :meth:`to_dict` as JSON; the arguments are passed to `json.dumps`."""
        return json.dumps(self.to_dict(), allow_nan=False, **kwargs)

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each block: its largest error, the position of that error, and its controls.

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

    def _summary(self, written: Callable[[float, int], str]) -> tuple[str, str]:
        """Return the line above the table and the verdict below it; ``written`` formats a number to some digits."""
        positions = len(self.error[0])
        return (
            f"{self.model}, {len(self.error)} blocks, {positions} positions, {self.prompts} "
            f"prompt{'s' if self.prompts > 1 else ''}, {self.dtype} on {self.device}, reference: {self.reference}"
            + (f", kept in front: the first {f'{self.keep} tokens' if self.keep > 1 else 'token'}" * bool(self.keep)),
            f"The identity {'holds' if self.holds else 'FAILS'} to {written(self.tolerance, 1)}: the largest error is "
            f"{written(self.max_error, 2)}. The whole model on the bare query has an error of "
            f"{written(self.output_error, 2)} with its edits and {written(self.output_control, 2)} without. "
            f"Without edits, {self.tested:.0%} of blocks and positions fail."
            + ("" if self.tested else " Nothing was tested: the context changes nothing here.")
            + (f" {self.cause}" if self.cause and not self.holds else ""),
        )

    def _table(self, form: str, written: Callable[[float, int], str]) -> str:
        cells = [
            {name: written(value, 2) if isinstance(value, float) else value for name, value in row.items()}
            for row in self.rows()
        ]
        return tabulate(cells, headers="keys", tablefmt=form, disable_numparse=True, stralign="right")

    def __str__(self) -> str:
        def written(value: float, digits: int) -> str:
            return f"{value:.{digits - 1}e}"

        head, verdict = self._summary(written)
        return f"{head}\n\n{self._table('simple', written)}\n\n{verdict}"

    def _repr_html_(self) -> str:
        def written(value: float, digits: int) -> str:
            return scientific(value, digits) if math.isfinite(value) else str(value)

        head, verdict = self._summary(written)
        # Where the table is wider than the page it scrolls: tabindex makes it reachable with the keyboard.
        return (
            '<div class="icl-report" style="overflow-x:auto" '
            'tabindex="0" role="group" aria-label="Verification report">'
            f"<p>{head}</p>{self._table('html', written)}<p>{html.escape(verdict, quote=False)}</p></div>"
        )


def _finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def _largest(values: list[float]) -> float:
    """Return the largest value, and infinity if one is NaN: `max` alone would ignore a NaN."""
    return max(values) if _finite(values) else math.inf


def _plain(value: Any) -> Any:
    """Replace NaN and infinities, which JSON cannot express, by None."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
