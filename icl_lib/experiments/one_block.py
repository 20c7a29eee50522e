"""A transformer of one block in training, validated with prompts and with edited weights (Dherin et al., Figure 2)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.block import implicit_update
from icl_lib.low_rank import LowRank
from icl_lib.measures import relative_error
from icl_lib.regression import Prompts, TrainingSettings, mean_squared_error, sample_prompts, train
from icl_lib.transformer import Transformer, TransformerConfig
from icl_lib.validation import require_size

ONE_BLOCK = TransformerConfig(dim=3, width=32, heads=8, head_dim=4, hidden=128, skip=False)
"""The transformer of Figure 2 in Dherin et al. is one causal block of width 32, no skips, norms or positions."""


def run_edited(
    model: Transformer, update: LowRank, sequence: Float[Tensor, "count n dim"]
) -> Float[Tensor, "count dim"]:
    r"""The model's own forward pass on each sequence, with its own weight edit, read at the last position.

    ``update`` ``[count, hidden, width]`` is added to the first linear map of the only block's MLP; everything else,
    the attention included, runs as in the unedited model. Give sequences of the bare query, ``n = 1``, and the context
    cannot enter but through the weights.
    """
    model.require_contextual_block()
    name = "blocks.0.mlp.0.weight"
    weights = model.get_parameter(name) + update

    def run(weight: Tensor, tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (tokens,))[-1]

    return torch.vmap(run)(weights, sequence)


@dataclass(frozen=True)
class TrainingCurves:
    """Losses over training; a list has one entry for each entry of ``step``.

    Attributes:
        settings: what was run.
        step: optimiser steps taken.
        training: loss on that step's fresh prompts.
        prompted: validation loss of $T_W(C, x)$, the model reading the prompts.
        edited: validation loss of $T_{W + ΔW}(x)$, the edited model reading the bare queries.
        unedited: validation loss of $T_W(x)$: the bare query without an edit. Control.
        swapped: validation loss of the bare query with the next prompt's edit. Control.
        difference: largest relative difference of ``prompted`` and ``edited`` outputs over the validation prompts,
            $\\max_k \\lVert T_{W+ΔW}(x_k) - T_W(C_k, x_k)\\rVert / \\lVert T_W(C_k, x_k)\\rVert$.
        zero: validation loss of answering zero every time, one number. Control.
    """

    settings: TrainingSettings
    step: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    prompted: list[float] = field(default_factory=list)
    edited: list[float] = field(default_factory=list)
    unedited: list[float] = field(default_factory=list)
    swapped: list[float] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    zero: float = float("nan")


def training_curves(
    settings: TrainingSettings | None = None,
    config: TransformerConfig = ONE_BLOCK,
    validation_prompts: int = 100,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[TrainingCurves, Transformer]:
    """Train a one-block transformer on in-context regression, and at every measurement validate it both ways.

    Reproduces Dherin et al. (arXiv 2507.16003), Figure 2: the validation loss of the model that reads the prompts, and
    of the edited model that reads the bare queries. Returns the curves and the trained model.

    >>> curves, model = training_curves(TrainingSettings(steps=2, batch=4, examples=5, every=1), progress=False)
    >>> curves.step, max(curves.difference) < 1e-12
    ([0, 1, 2], True)
    """
    require_size("validation_prompts", validation_prompts, least=2)  # one has no other to be swapped with
    settings = settings or TrainingSettings()
    validation = sample_prompts(
        validation_prompts, settings.examples, settings.features, seed=settings.seed + 2, dtype=dtype, device=device
    )
    curves = TrainingCurves(settings, zero=validation.target.square().mean().item())

    def measure(step: int, loss: float, model: Transformer) -> None:
        curves.step.append(step)
        curves.training.append(loss)
        validate(model, validation, curves)

    model = train(lambda: Transformer(config), settings, measure, dtype, device, progress)
    return curves, model


def validate(model: Transformer, prompts: Prompts, curves: TrainingCurves) -> None:
    """Append the losses of ``model`` on ``prompts`` to ``curves``: with the prompt, with the edit, and the controls."""
    block = model.contextual_block()
    update = implicit_update(block, prompts.context, prompts.query).weight
    bare = prompts.sequence[:, -1:]
    outputs = {
        "prompted": model(prompts.sequence)[:, -1],
        "edited": run_edited(model, update, bare),
        "unedited": model(bare)[:, -1],
        "swapped": run_edited(model, LowRank(update.left.roll(1, 0), update.right.roll(1, 0)), bare),
    }
    for name, output in outputs.items():
        getattr(curves, name).append(mean_squared_error(output, prompts).item())
    curves.difference.append(relative_error(outputs["edited"], outputs["prompted"]).max().item())
