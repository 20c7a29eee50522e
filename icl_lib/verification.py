r"""Check the identity for a model and a prompt: an error for every block and position, with its control.

The check runs the model's own blocks with edited weights on the residual stream of the query alone, and then the whole
model on the bare query. The edits are kept as factors: an edited linear map outputs $W z + L (R^\top z)$, and
:meth:`icl_lib.patch.Patch.merged` computes the matrix $W + L R^\top$. The activation with the context is used only to
compute an edit; it is never given to the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.absorb import Observation, check_absorb, first_position, observe
from icl_lib.language.call import is_tokens
from icl_lib.language.verification import verify_tokens
from icl_lib.measures import relative_error, wide
from icl_lib.models.anatomy import anatomy_of
from icl_lib.patch import Patch
from icl_lib.report import TOLERANCE, Report, by_prompt
from icl_lib.validation import validated_by


def _check_verify(
    model: Any,
    inputs: Any,
    context_length: Any,
    reference: Any,
    positions: Any,
    tolerance: Any,
    outer: Any,
    joint: Any,
    progress: Any,
) -> None:
    check_absorb(model, inputs, context_length, reference, positions, outer, joint)
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
    outer: str | None = None,
    joint: bool = False,
    progress: bool = False,
) -> Report:
    r"""Check the identity in every block and at every position of a model, on a batch of prompts.

    $$T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x)$$

    Source: Innocenti and Achour (arXiv 2512.11255, version 1), Theorem 1. The check also runs the whole patched model
    on the bare query and compares its output with that of the model on the prompt. Each block is checked as soon as it
    has run, and only the query's edits are kept. A language model, whose inputs are token ids, is run as a whole on the
    bare query (:mod:`icl_lib.language.passes`).

    Args:
        model, inputs, context_length, reference, positions, outer, joint, progress: as for
            :func:`icl_lib.absorb.absorb`.
        tolerance: the largest relative error for which :attr:`icl_lib.report.Report.holds` is true. By default 1e-12
            for float64, 1e-5 for float32, and eight rounding errors in 16 bits: 8e-3 for float16 and 6e-2 for bfloat16.

    Raises `ValueError` as :func:`icl_lib.absorb.absorb` does. A failed identity raises no error: the report says so. As
    in :func:`icl_lib.theorem.weight_update`, precision is lost where the activation without the context is much longer
    than the one with it.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=8, blocks=3, heads=2, norm="pre")).double()
    >>> report = verify(model, torch.randn(4, 10, 8).double(), context_length=9)
    >>> report.holds, min(map(min, report.control)) > 1e-3
    (True, True)
    """
    if is_tokens(inputs):
        return verify_tokens(model, inputs, context_length, reference, positions, tolerance, outer, joint, progress)
    anatomy = anatomy_of(model)
    first = first_position(inputs, context_length, reference, positions)
    error, control, squared, at_query = [], [], [], []

    def check(seen: Observation) -> None:
        patched = seen.patched(anatomy)
        error.append(by_prompt(patched, seen.output).amax(0).tolist())
        control.append(by_prompt(seen.output_alone, seen.output).amin(0).tolist())
        squared.append((patched - seen.output).to(wide(patched)).square().mean().item())
        at_query.append(seen.edits.at(slice(context_length - first, None)))

    output = observe(model, inputs, context_length, reference, first, check)[..., context_length:, :]
    edited, bare = _bare_outputs(
        model, Patch(tuple(at_query), anatomy, reference, context_length, context_length), inputs
    )
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
        output_error=relative_error(edited, output).max().item(),
        output_control=relative_error(bare, output).min().item(),
        tolerance=TOLERANCE[inputs.dtype] if tolerance is None else float(tolerance),
    )


def _bare_outputs(model: nn.Module, patch: Patch, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of the whole model for the bare query: with its patch, and without."""
    bare = patch.bare(inputs)
    with torch.no_grad():
        without = model(bare)
        with patch.applied(model):
            edited = model(bare)
    return tuple(t if patch.reference == "query" else t.squeeze(-2) for t in (edited, without))
