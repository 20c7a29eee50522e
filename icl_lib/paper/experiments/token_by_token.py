r"""A block that reads its prompts token by token: the length and the direction of each step of the weights.

The experiments of Dherin et al. (arXiv 2507.16003), Figures 3 and 4, and the cosines and the recurrent layer of their
version 4, with predictions and controls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.block import ContextualBlock
from icl_lib.blocks.contextual import GRU
from icl_lib.dynamics.from_left import eaten_from_left
from icl_lib.dynamics.lms import normalised_lms
from icl_lib.dynamics.path import Trajectory, trajectory
from icl_lib.dynamics.task import answers, task_gradients
from icl_lib.low_rank import LowRank
from icl_lib.measures import relative_error
from icl_lib.paper.fine_tuning import fine_tune, fine_tuned_losses
from icl_lib.paper.regression import Prompts, squared_error
from icl_lib.theorem import alignment, weight_update

PROMPTS_AT_ONCE = 10


class Estimate(NamedTuple):
    """A mean over prompts and its standard error: numbers, or arrays with one entry for each token.

    >>> print(Estimate(-0.937, 0.008))
    −0.94 ± 0.01
    """

    mean: np.ndarray | float
    error: np.ndarray | float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}".replace("-", "\N{MINUS SIGN}")


def estimate(values: Float[Tensor, "*prompts_and_tokens"]) -> Estimate:
    """The mean over prompts and its standard error; entries that are not finite are left out.

    >>> mean, error = estimate(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> mean.tolist(), error.tolist()
    ([2.0, 5.0], [1.0, 0.0])
    """
    array = values.detach().double().cpu().numpy()
    count = np.isfinite(array).sum(0)
    if (count < 2).any():
        raise ValueError(
            f"values has shape {tuple(values.shape)}: a standard error needs two finite entries or more for each token."
        )
    array = np.where(np.isfinite(array), array, np.nan)
    mean, error = np.nanmean(array, 0), np.nanstd(array, 0, ddof=1) / np.sqrt(count)
    return Estimate(mean, error) if array.ndim > 1 else Estimate(float(mean), float(error))


def decay_exponent(norms: Float[Tensor, "prompts n"], first: int = 2) -> Estimate:
    r"""The slope of the norms on log–log axes: the exponent $p$ of $\lVert W_i - W_{i-1} \rVert \propto i^{\,p}$.

    A straight line is fitted to each prompt, from token ``first`` on, so the standard error is over prompts. A prompt
    with a step of length zero is left out. Raises `ValueError` for fewer than two tokens to fit.

    >>> i = torch.arange(1, 101, dtype=torch.float64)
    >>> round(decay_exponent(torch.stack([1 / i, 3 / i])).mean, 12)
    -1.0
    """
    if norms.shape[-1] <= first:
        raise ValueError(f"norms has {norms.shape[-1]} tokens: a line from token {first} on needs {first + 1} or more.")
    x = torch.arange(first, norms.shape[-1] + 1, dtype=torch.float64).log()
    y = norms[..., first - 1 :].detach().double().cpu().log()
    x = x - x.mean()
    return estimate((x * y).sum(-1) / x.square().sum())


@dataclass(frozen=True)
class Cosines:
    """The cosines of steps with descent directions.

    Attributes:
        by_token: the cosine at each token.
        mean: its mean over tokens.
        size: the mean of the absolute values of single cosines.
        positive: the share of single cosines that are positive.
        ceiling: an upper bound of ``size``, from the right factors of steps and gradients, which differ.
        dimensions: of the span of the gradients' left factors, over prompts and tokens, as :func:`dimensions` counts.
        other: the control: the cosines with the gradients of another prompt, at the same token.
    """

    by_token: Estimate
    mean: Estimate
    size: float
    positive: float
    ceiling: float
    dimensions: float
    other: Cosines | None = None

    @classmethod
    def of(cls, steps: LowRank, gradients: LowRank, ceilings: Tensor) -> Cosines:
        """From all steps and gradients, ``[prompts, n, out, in]``, and upper bounds of the sizes of their cosines.

        In the control, each prompt keeps the right factors of its own gradients, which depend on no example's answer,
        and takes the left factors of the prompt before it.
        """
        return cls._of(steps, gradients, ceilings, cls._of(steps, _of_another_prompt(gradients), ceilings, None))

    @classmethod
    def _of(cls, steps: LowRank, gradients: LowRank, ceilings: Tensor, other: Cosines | None) -> Cosines:
        cosines = alignment(steps, -gradients)
        known = cosines[cosines.isfinite()]
        return cls(
            by_token=estimate(cosines),
            mean=estimate(cosines.nanmean(-1)),
            size=known.abs().mean().item(),
            positive=(known > 0).double().mean().item(),
            ceiling=ceilings.mean().item(),
            dimensions=dimensions(gradients.left.squeeze(-1)),
            other=other,
        )


def _of_another_prompt(matrices: LowRank) -> LowRank:
    """The same right factors, with the left factors of the prompt before; the first prompt gets those of the last."""
    return LowRank(matrices.left.roll(1, 0), matrices.right)


def dimensions(vectors: Float[Tensor, "*any size"]) -> float:
    r"""How many dimensions the directions of vectors span: the participation ratio $1 / \sum_k \lambda_k^2$.

    $\lambda_k$ are the eigenvalues of the mean of $u u^\top$ over the unit vectors $u$. The mean squared cosine of two
    vectors drawn at random is one over this number. Zero vectors are left out.

    >>> round(dimensions(torch.eye(5)[:3]), 6), round(dimensions(torch.tensor([[1.0, 1.0], [-2.0, -2.0]])), 6)
    (3.0, 1.0)
    """
    flat = vectors.reshape(-1, vectors.shape[-1])
    unit = flat / torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    unit = unit[unit.isfinite().all(-1)]
    return (1 / (unit.mT @ unit / len(unit)).square().sum()).item()


@dataclass(frozen=True)
class TokenByToken:
    """Measurements at each token, over prompts; made by :func:`read_token_by_token`.

    The last seven are None for a layer that is not a running average.

    Attributes:
        norms: $\\lVert W_i - W_{i-1} \\rVert_F$ for tokens 1 … n, each $W_i$ from a separate pass (Figure 3).
        exponent: the slope of the norms on log–log axes.
        dimensions: of the span of the steps' left factors, over prompts and tokens, as :func:`dimensions` counts.
        loss: squared error at the query with the weights $W_i$, tokens 0 … n (Figure 4).
        exact: the largest relative error of the edited block's outputs, over prompts and tokens.
        towards_answer: cosines of the steps with the descent directions of the query's loss.
        towards_example: the same for the loss on the example that is read, as in SGD.
        predicted: the norms as the running average of the layer predicts them.
        agreement: the largest relative difference of ``predicted`` and measured norms, over prompts and tokens.
        fell: the share of normalised LMS losses, over heads, tokens and prompts, that their step lowers.
        lms_before, lms_after: the normalised LMS loss of each token, mean over heads, before and after its step.
        rates: the rate of attention for each token, mean over heads.
        scatter: the root mean square of the relative deviation of single rates from $1/(i+1)$.
    """

    norms: Estimate
    exponent: Estimate
    dimensions: float
    loss: Estimate
    exact: float
    towards_answer: Cosines
    towards_example: Cosines
    predicted: Estimate | None
    agreement: float | None
    fell: float | None
    lms_before: Estimate | None
    lms_after: Estimate | None
    rates: Estimate | None
    scatter: float | None


def read_token_by_token(block: ContextualBlock, prompts: Prompts) -> TokenByToken:
    """Follow the weights of a block through many prompts.

    Raises `ValueError` for fewer than two prompts, which have no standard error.

    >>> from icl_lib.paper.regression import sample_prompts
    >>> reading = read_token_by_token(recurrent_block().double(), sample_prompts(4, examples=6, features=2, seed=0))
    >>> reading.norms.mean.shape, reading.loss.mean.shape, reading.predicted
    ((6,), (7,), None)
    """
    context, query, questions = prompts.context, prompts.query, prompts.questions
    path = trajectory(block, context, query)
    edited = answers(block, path.updates, query.unsqueeze(-2), path.bias_updates if block.skip else None)
    norms, own = _pass_by_pass(block, prompts)
    to_answer = functools.partial(squared_error, answer=prompts.target.unsqueeze(-1))
    to_example = functools.partial(squared_error, answer=context[..., -1])
    with torch.no_grad():
        start, alone = path.activations[:, :1], block.read(questions.unsqueeze(-2)[..., :0, :], questions)
        ceilings = torch.nn.functional.cosine_similarity(start, alone, dim=-1).abs()
    steps = path.increments
    bias = path.bias_updates[..., :-1, :] if block.skip else None
    gradients = functools.partial(task_gradients, block, path.updates[..., :-1], bias=bias)
    return TokenByToken(
        norms=estimate(norms),
        exponent=decay_exponent(norms),
        dimensions=dimensions(steps.left.squeeze(-1)),
        loss=estimate(to_answer(edited)),
        exact=relative_error(edited, own).max().item(),
        towards_answer=Cosines.of(steps, gradients(query.unsqueeze(-2), to_answer), torch.ones(())),
        towards_example=Cosines.of(steps, gradients(questions, to_example), ceilings),
        **_as_average(block, prompts, path, norms),
    )


@torch.no_grad()
def _pass_by_pass(block: ContextualBlock, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The lengths of the steps and the block's own outputs, from a separate pass for each number of tokens."""
    read: list[Tensor] = []
    outputs: list[Tensor] = []
    hook = block.mlp.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    try:
        for tokens in reversed(range(prompts.context.shape[-2] + 1)):  # the longest first: the others reuse its memory
            outputs.append(block(prompts.context[..., :tokens, :], prompts.query))
    finally:
        hook.remove()
    activations = torch.stack(read[::-1], dim=-2)
    left = weight_update(block.first_linear.weight, activations[..., :1, :], activations).left
    return left.diff(dim=-3).flatten(-2).norm(dim=-1), torch.stack(outputs[::-1], dim=-2)


def _as_average(block: ContextualBlock, prompts: Prompts, path: Trajectory, norms: Tensor) -> dict[str, Any]:
    """The measurements that need a running average, and None for a layer that is not one."""
    names = ("predicted", "agreement", "fell", "lms_before", "lms_after", "rates", "scatter")
    if path.prefixes.average is None:
        return dict.fromkeys(names)
    # The targets have an entry for each hidden unit, head, token and prompt: a few prompts at a time save memory.
    parts = [
        normalised_lms(trajectory(block, context, query))
        for context, query in zip(
            prompts.context.split(PROMPTS_AT_ONCE), prompts.query.split(PROMPTS_AT_ONCE), strict=True
        )
    ]
    predicted, before, after, rates = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("marginal_norms", "before", "after", "rates")
    )
    count = torch.arange(2, norms.shape[-1] + 2, dtype=norms.dtype, device=norms.device)
    of_all = (
        estimate(predicted),
        ((predicted - norms).abs() / norms).max().item(),
        (after < before).double().mean().item(),
        *(estimate(values.mean(-1)) for values in (before, after, rates)),
        (rates * count[:, None] - 1).square().mean().sqrt().item(),
    )
    return dict(zip(names, of_all, strict=True))


@dataclass(frozen=True)
class BesideSGD:
    """SGD on the examples of each prompt, compared with reading them; made by :func:`compare_with_sgd`.

    Attributes:
        loss: squared error at the query after 0 … n steps of SGD.
        cosine: of the sum of all SGD steps with the weight update of the whole prompt.
        ceiling: the largest possible cosine with a matrix of rank one whose right factor is the query's $a_0$.
        other: the control: the cosine with the update whose left factor is another prompt's.
    """

    loss: Estimate
    cosine: Estimate
    ceiling: Estimate
    other: Estimate


def compare_with_sgd(
    block: ContextualBlock, prompts: Prompts, learning_rates: Sequence[float]
) -> dict[float, BesideSGD]:
    """Train the block's first linear map on the examples of each prompt, at several learning rates (Figure 4)."""
    whole = trajectory(block, prompts.context, prompts.query).updates[..., -1]
    compared = {}
    for rate in learning_rates:
        steps = fine_tune(block, prompts, rate)
        compared[rate] = BesideSGD(
            loss=estimate(fine_tuned_losses(block, prompts, steps)),
            cosine=estimate(alignment(steps, whole)),
            ceiling=estimate(steps.matvec(whole.right.squeeze(-1)).norm(dim=-1) / steps.norm()),
            other=estimate(alignment(steps, _of_another_prompt(whole))),
        )
    return compared


def lower_next(block: ContextualBlock, prompts: Prompts, learning_rate: float) -> dict[str, float]:
    """The share of steps that lower the loss of the next token, which is not known when the step is taken.

    For ``reading``, the losses are those of ``Trajectory.linear_losses``. They are linear, so the step before lowers
    one if and only if the two steps have a positive inner product. For ``SGD`` on the first linear map, the loss is the
    squared error of the next example.

    >>> from icl_lib.paper.regression import sample_prompts
    >>> prompts = sample_prompts(count=4, examples=6, features=2, seed=0)
    >>> sorted(lower_next(recurrent_block().double(), prompts, 0.01))
    ['SGD', 'reading']
    """
    steps = trajectory(block, prompts.context, prompts.query).increments
    trained, right = fine_tune(block, prompts, learning_rate), prompts.context[..., -1]
    fell = []
    for i in range(1, right.shape[-1]):
        before, after = (
            squared_error(answers(block, trained.first(taken), prompts.questions[:, i]), right[:, i])
            for taken in (i - 1, i)
        )
        fell.append(after < before)
    return {
        "reading": (steps[:, 1:].inner(steps[:, :-1]) > 0).double().mean().item(),
        "SGD": torch.stack(fell).double().mean().item(),
    }


def ranks_from_left(block: ContextualBlock, prompts: Prompts) -> Estimate:
    """The numerical rank of $P_i - W$ after 0 … n tokens eaten from the left."""
    eaten = eaten_from_left(block, prompts.context, prompts.query)
    count = prompts.context.shape[-2]
    return estimate(torch.stack([eaten.after(i).rank() for i in range(count + 1)], dim=-1).double())


def recurrent_block(dim: int = 3, hidden: int = 32, mlp: int = 128) -> ContextualBlock:
    """A contextual block like the transformer's, whose contextual layer is a GRU."""
    layers = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, dim))
    return ContextualBlock(GRU(dim, hidden), layers)
