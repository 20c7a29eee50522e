r"""Does the identity hold for this model and this prompt? An error for every block and position, beside its control.

The check runs the model's own blocks with edited weights on the stream of the query alone, and then the whole model on
the bare query. The edits are kept as factors: a linear map answers $W z + L (R^\top z)$, which is what
:meth:`icl_lib.patch.Patch.merged` forms in full. What the MLP reads with the context is used to compute an edit and
never handed to the MLP.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from icl_lib.absorb import Observation, check_absorb, first_position, observe
from icl_lib.anatomy import anatomy_of
from icl_lib.patch import Patch
from icl_lib.validation import validated_by

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""The relative error up to which the identity is said to hold; :func:`verify` takes another."""


@dataclass(frozen=True)
class Report:
    r"""What :func:`verify` measured. Lists run over blocks, and inside over positions.

    An error is $\lVert T_{\text{patched}} - T(C, x)_i \rVert / \lVert T(C, x)_i \rVert$; the control is the same for
    the block without its edits.

    Attributes:
        model: the name of its class.
        reference: what the patched blocks were fed, see :func:`icl_lib.absorb.absorb`.
        context_length: number of tokens that were replaced.
        first: position of the first entry of the inner lists.
        prompts: number of prompts, over which ``error`` is the largest and ``control`` the smallest.
        dtype: precision of the arithmetic.
        device: where it ran.
        versions: of torch.
        error: relative error of each patched block at each position, ``[blocks][positions]``.
        control: the same without the patch.
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


def _check_verify(model: Any, inputs: Any, context_length: Any, reference: Any, positions: Any, tolerance: Any) -> None:
    check_absorb(model, inputs, context_length, reference, positions)
    if tolerance is not None and not (type(tolerance) in (int, float) and tolerance > 0):
        raise ValueError(f"tolerance is {tolerance!r}: give a positive number, such as 1e-12.")


@validated_by(_check_verify)
def verify(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str = "query",
    positions: str | None = None,
    tolerance: float | None = None,
) -> Report:
    r"""Check the identity in every block and at every position of a model, on a batch of prompts.

    $$T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x)$$

    (Innocenti and Achour, Theorem 1), and that the whole patched model answers the bare query as it answers the prompt.
    Each block is checked as soon as it has run; of its edits only the query's are kept.

    Args:
        model, inputs, context_length, reference, positions: as for :func:`icl_lib.absorb.absorb`.
        tolerance: the relative error up to which :attr:`Report.holds`; by default 1e-12 for float64, 1e-5 for float32.

    Raises `ValueError` as :func:`icl_lib.absorb.absorb` does. An identity that fails is no error: it is reported. As in
    :func:`icl_lib.theorem.weight_update`, digits are lost where a query is much longer than the tokens of its context.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=8, blocks=3, heads=2, norm="pre")).double()
    >>> report = verify(model, torch.randn(4, 10, 8).double(), context_length=9)
    >>> report.holds, min(map(min, report.control)) > 1e-3
    (True, True)
    """
    anatomy = anatomy_of(model)
    first = first_position(inputs, context_length, reference, positions)
    error, control, squared, at_query = [], [], [], []

    def check(seen: Observation) -> None:
        patched = seen.patched(anatomy)
        error.append(_by_prompt(patched, seen.output).amax(0).tolist())
        control.append(_by_prompt(seen.output_alone, seen.output).amin(0).tolist())
        squared.append((patched - seen.output).to(_wide(patched)).square().mean().item())
        at_query.append(seen.edits.at(slice(context_length - first, None)))

    output = observe(model, inputs, context_length, reference, first, check)[..., context_length:, :]
    answer, bare = _answers(model, Patch(tuple(at_query), anatomy, reference, context_length, context_length), inputs)
    return Report(
        model=type(model).__name__,
        reference=reference,
        context_length=context_length,
        first=first,
        prompts=inputs.shape[:-2].numel(),
        dtype=str(inputs.dtype).removeprefix("torch."),
        device=str(inputs.device),
        versions={"torch": torch.__version__},
        error=error,
        control=control,
        mean_squared_difference=squared,
        output_error=_relative(answer, output).max().item(),
        output_control=_relative(bare, output).min().item(),
        tolerance=TOLERANCE[inputs.dtype] if tolerance is None else float(tolerance),
    )


def _answers(model: nn.Module, patch: Patch, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """What the whole model answers to the bare query: with its patch, and without."""
    bare = patch.bare(inputs)
    with torch.no_grad():
        without = model(bare)
        with patch.applied(model):
            answer = model(bare)
    return tuple(t if patch.reference == "query" else t.squeeze(-2) for t in (answer, without))


def _by_prompt(actual: Tensor, expected: Tensor) -> Tensor:
    """The relative distance for each prompt and position, ``[prompts, positions]``."""
    return _relative(actual, expected).reshape(-1, expected.shape[-2])


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    """The relative distance of the vectors at each position; 0 where both are zero."""
    actual, expected = actual.to(_wide(actual)), expected.to(_wide(actual))
    distance = torch.linalg.vector_norm(actual - expected, dim=-1)
    return torch.where(distance == 0, distance, distance / torch.linalg.vector_norm(expected, dim=-1))


def _wide(tensor: Tensor) -> torch.dtype:
    """Squares of half precision overflow."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


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
