"""One-block transformers: validation with prompts and with edited weights during training, and smaller edits.

The training curves are Figure 2 of Dherin et al. (arXiv 2507.16003, version 1).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.block import ContextualBlock, implicit_update
from icl_lib.blocks.structure import replaced
from icl_lib.blocks.transformer import Transformer, TransformerConfig
from icl_lib.low_rank import LowRank
from icl_lib.measures import relative_error
from icl_lib.paper.regression import Prompts, TrainingSettings, mean_squared_error, sample_prompts, train
from icl_lib.validation import require_size

ONE_BLOCK = TransformerConfig(dim=3, width=32, heads=8, head_dim=4, hidden=128, skip=False)
"""The transformer of Figure 2 in Dherin et al. is one causal block of width 32, no skips, norms or positions."""


def run_edited(
    model: Transformer, update: LowRank, sequence: Float[Tensor, "count n dim"]
) -> Float[Tensor, "count dim"]:
    r"""Run the model's own forward pass on each sequence with that sequence's weight edit; return the last output.

    ``update`` ``[count, hidden, width]`` is added to the first linear map of the only block's MLP. Everything else,
    the attention included, runs as in the unedited model. With sequences of the bare query, ``n = 1``, the context can
    enter only through the weights.
    """
    model.require_contextual_block()
    name = "blocks.0.mlp.0.weight"
    weights = model.get_parameter(name) + update

    def run(weight: Tensor, tokens: Tensor) -> Tensor:
        return torch.func.functional_call(model, {name: weight}, (tokens,))[-1]

    return torch.vmap(run)(weights, sequence)


@dataclass(frozen=True)
class TrainingCurves:
    """Losses over training; each list has one entry for each entry of ``step``.

    Attributes:
        settings: what was run.
        step: optimiser steps taken.
        training: loss on that step's fresh prompts.
        prompted: validation loss of $T_W(C, x)$, the model reading the prompts.
        edited: validation loss of $T_{W + ΔW}(x)$, the edited model reading the bare queries.
        unedited: validation loss of $T_W(x)$, the unedited model reading the bare queries. Control.
        swapped: validation loss with the next prompt's edit. Control.
        difference: largest relative difference of the ``prompted`` and ``edited`` outputs over the validation prompts,
            $\\max_k \\lVert T_{W+ΔW}(x_k) - T_W(C_k, x_k)\\rVert / \\lVert T_W(C_k, x_k)\\rVert$.
        zero: validation loss of the constant answer 0, one number. Control.
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
    """Train a one-block transformer on in-context regression and validate it with prompts and with edited weights.

    Reproduces Figure 2 of Dherin et al. (arXiv 2507.16003, version 1): the validation loss of the model that reads the
    prompts, and of the edited model that reads the bare queries. Returns the curves and the trained model.

    >>> curves, model = training_curves(TrainingSettings(steps=2, batch=4, examples=5, every=1), progress=False)
    >>> curves.step, max(curves.difference) < 1e-12
    ([0, 1, 2], True)
    """
    require_size("validation_prompts", validation_prompts, least=2)  # the swapped edits need a second prompt
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
    """Append the losses of ``model`` on ``prompts`` to ``curves``: with the prompt, with the edit, and two controls."""
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


def smaller_edits(
    block: ContextualBlock,
    context: Float[Tensor, "*batch n dim"],
    query: Float[Tensor, "*batch dim"],
    iterations: int = 100,
) -> LowRank:
    r"""Search for the smallest edit $E$ of $W$ that keeps the *output* of the MLP, not its pre-activation.

    $$\min_E \lVert E \rVert_F \quad\text{subject to}\quad f_\theta\bigl((W + E) a_0 + b\bigr) = f_\theta(W a_C + b).$$

    Only $d = E a_0$ enters the constraint, and $E = d\, a_0^\top / \lVert a_0 \rVert^2$ is the smallest edit with this
    $d$. So the search is over $d$, starting from zero. Each iteration linearises the constraint at the current $d$,
    with the Jacobian $J$ of $f_\theta$ and the missing output $r$, and goes half way between the nearest solution,
    $d + J^+ r$, and the smallest one, $J^+ (r + J d)$. (Going to the smallest one at once can oscillate.)

    The iteration need not converge, and its limit is a stationary point of the problem, not always the minimum: compare
    the outputs of the edited block. The edits replace the whole context. They reproduce the output for this $f_\theta$;
    :func:`~icl_lib.theorem.weight_update` gives the smallest edit that does so for every $f_\theta$.

    Shapes: the result is one rank-one :class:`~icl_lib.low_rank.LowRank` ``[*batch, out, in]``. Raises `ValueError` for
    an empty context, and where the shapes, dtypes or devices of block and prompt differ.

    >>> block = Transformer(ONE_BLOCK).double().contextual_block()
    >>> prompts = sample_prompts(count=4, examples=10, features=2, seed=0)
    >>> formula = implicit_update(block, prompts.context, prompts.query).weight
    >>> bool((smaller_edits(block, prompts.context, prompts.query).norm() < formula.norm()).all())
    True
    """
    require_size("iterations", iterations)
    update = implicit_update(block, context, query).weight
    with torch.no_grad():
        a_without = block.read(context[..., :0, :], query)
        a_with = block.read(context, query)
        start, target = (block.first_linear(a).reshape(-1, update.shape[-2]) for a in (a_without, a_with))
        tail = replaced(copy.deepcopy(block.mlp), block._first, nn.Identity())  # f_θ
        jacobian = torch.func.vmap(torch.func.jacrev(tail))
        wanted, change = tail(target), torch.zeros_like(start)
        for _ in range(iterations):
            slope = jacobian(start + change)
            inverse = torch.linalg.pinv(slope)
            nearest = change + (inverse @ (wanted - tail(start + change)).unsqueeze(-1)).squeeze(-1)
            across = change - (inverse @ (slope @ change.unsqueeze(-1))).squeeze(-1)  # it leaves the output as it is
            change = nearest - across / 2
    left = change.reshape(*update.batch_shape, -1) / torch.linalg.vector_norm(a_without, dim=-1, keepdim=True)
    return LowRank(left.unsqueeze(-1), update.right)


def with_other_tail(model: Transformer, seed: int = 0) -> Transformer:
    r"""A copy of a one-block model with another $f_\theta$: everything after the MLP's activation is drawn anew.

    The contextual layer, $W$ and $b$ stay, so an edit that reproduces the pre-activation works in the copy too.

    >>> model = Transformer(ONE_BLOCK)
    >>> other = with_other_tail(model)
    >>> torch.equal(other.blocks[0].mlp[0].weight, model.blocks[0].mlp[0].weight)
    True
    >>> torch.equal(other.blocks[0].mlp[-1].weight, model.blocks[0].mlp[-1].weight)
    False
    """
    model.require_contextual_block()
    other = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        drawn = Transformer(model.config).to(next(model.parameters()))
    other.blocks[0].mlp[1:].load_state_dict(drawn.blocks[0].mlp[1:].state_dict())
    other.unembed.load_state_dict(drawn.unembed.state_dict())
    return other
