r"""A block that reads its prompts token by token: how far each token moves the weights, where to, and what for.

The experiments of Dherin et al. (arXiv 2507.16003), Figures 3 and 4, and the cosines and the recurrent layer of their
later version (v4), each with what theory predicts beside it.
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

from icl_lib.block import ContextualBlock
from icl_lib.contextual import GRU
from icl_lib.dynamics.from_left import eaten_from_left
from icl_lib.dynamics.lms import normalised_lms
from icl_lib.dynamics.path import Trajectory, trajectory
from icl_lib.dynamics.task import answers, step_alignment
from icl_lib.fine_tuning import fine_tune, fine_tuned_losses
from icl_lib.measures import relative_error
from icl_lib.regression import Prompts, squared_error
from icl_lib.theorem import alignment, weight_update


class Estimate(NamedTuple):
    """A mean over prompts and its standard error: numbers, or arrays with one entry a token.

    >>> print(Estimate(-0.937, 0.008))
    −0.94 ± 0.01
    """

    mean: np.ndarray | float
    error: np.ndarray | float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.error:.2f}".replace("-", "\N{MINUS SIGN}")


def estimate(values: Float[Tensor, "*prompts_and_tokens"]) -> Estimate:
    """The mean over prompts, and its standard error; what is not a finite number is left out.

    >>> mean, error = estimate(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
    >>> mean.tolist(), error.tolist()
    ([2.0, 5.0], [1.0, 0.0])
    """
    array = values.detach().double().cpu().numpy()
    count = np.isfinite(array).sum(0)
    if (count < 2).any():
        raise ValueError(f"values has shape {tuple(values.shape)}: a standard error needs two finite prompts or more.")
    array = np.where(np.isfinite(array), array, np.nan)
    mean, error = np.nanmean(array, 0), np.nanstd(array, 0, ddof=1) / np.sqrt(count)
    return Estimate(mean, error) if array.ndim > 1 else Estimate(float(mean), float(error))


def decay_exponent(norms: Float[Tensor, "prompts n"], first: int = 2) -> Estimate:
    r"""The slope of the norms on log–log axes: the exponent $p$ of $\lVert W_i - W_{i-1} \rVert \propto i^{\,p}$.

    A straight line is fitted to each prompt, from token ``first`` on, so that the standard error is over prompts; one
    with a step of length zero has no logarithm and is left out. Raises `ValueError` for fewer than two tokens to fit.

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
    """How steps lie to descent directions.

    Attributes:
        by_token: the cosine at each token.
        mean: its mean over tokens.
        size: the mean size of single cosines, whatever their sign.
        positive: the share of single cosines that are positive.
        ceiling: what the mean size can be at most, since the two do not end in the same factor.
    """

    by_token: Estimate
    mean: Estimate
    size: float
    positive: float
    ceiling: float

    @classmethod
    def of(cls, cosines: Float[Tensor, "prompts n"], ceilings: Tensor) -> Cosines:
        """From the cosine of every step, and what each can be at most."""
        known = cosines[cosines.isfinite()]
        return cls(
            by_token=estimate(cosines),
            mean=estimate(cosines.nanmean(-1)),
            size=known.abs().mean().item(),
            positive=(known > 0).double().mean().item(),
            ceiling=ceilings.mean().item(),
        )


@dataclass(frozen=True)
class TokenByToken:
    """What happens at each token, over prompts; made by :func:`read_token_by_token`.

    Attributes:
        norms: $\\lVert W_i - W_{i-1} \\rVert_F$, tokens 1 … n, each $W_i$ from a pass of its own (Figure 3).
        exponent: their slope on log–log axes.
        predicted: the same norms as the running average of the layer predicts them; None for a layer without one.
        agreement: the largest relative difference of the two, over prompts and tokens; None likewise.
        loss: squared error at the query with the weights $W_i$, tokens 0 … n (Figure 4).
        exact: largest relative difference of the edited block's outputs from the block's own after each token.
        towards_answer: each step beside the descent direction of the query's own loss.
        towards_example: the same for the loss on the example that is read, which SGD would follow.
        lms_before, lms_after: the normalised LMS loss of each token, mean over heads, before its step and after; None
            for a layer without a running average.
        fell: the share of these losses, over heads, tokens and prompts, that their step lowers; None likewise.
        rates: attention's rate for each token, mean over heads; None likewise.
        scatter: how far single rates are from $1/(i+1)$, relatively, as a root mean square; None likewise.
    """

    norms: Estimate
    exponent: Estimate
    predicted: Estimate | None
    agreement: float | None
    loss: Estimate
    exact: float
    towards_answer: Cosines
    towards_example: Cosines
    lms_before: Estimate | None
    lms_after: Estimate | None
    fell: float | None
    rates: Estimate | None
    scatter: float | None


def read_token_by_token(block: ContextualBlock, prompts: Prompts) -> TokenByToken:
    """Follow the weights of a block through each of many prompts.

    Raises `ValueError` for fewer than two prompts, of which no standard error could be given.

    >>> from icl_lib.regression import sample_prompts
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
    return TokenByToken(
        norms=estimate(norms),
        exponent=decay_exponent(norms),
        loss=estimate(to_answer(edited)),
        exact=relative_error(edited, own).max().item(),
        towards_answer=Cosines.of(step_alignment(path, block, query, to_answer), torch.ones(())),
        towards_example=Cosines.of(step_alignment(path, block, questions, to_example), ceilings),
        **_as_average(path, norms),
    )


def _pass_by_pass(block: ContextualBlock, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """The lengths of the steps and the block's own outputs, from one pass for each number of tokens."""
    read, outputs = [], []
    with torch.no_grad():
        for tokens in range(prompts.context.shape[-2] + 1):
            prefix = prompts.context[..., :tokens, :]
            read.append(block.read(prefix, prompts.query))
            outputs.append(block(prefix, prompts.query))
        activations = torch.stack(read, dim=-2)
        left = weight_update(block.first_linear.weight, activations[..., :1, :], activations).left
    return left.diff(dim=-3).flatten(-2).norm(dim=-1), torch.stack(outputs, dim=-2)


def _as_average(path: Trajectory, norms: Tensor) -> dict[str, Any]:
    """What can be said of a layer that is a running average, and None where it is none."""
    names = ("predicted", "agreement", "fell", "lms_before", "lms_after", "rates", "scatter")
    if path.prefixes.average is None:
        return dict.fromkeys(names)
    lms = normalised_lms(path)
    count = torch.arange(2, norms.shape[-1] + 2, dtype=norms.dtype, device=norms.device)
    of_all = (
        estimate(lms.marginal_norms),
        ((lms.marginal_norms - norms).abs() / norms).max().item(),
        (lms.after < lms.before).double().mean().item(),
        *(estimate(values.mean(-1)) for values in (lms.before, lms.after, lms.rates)),
        (lms.rates * count[:, None] - 1).square().mean().sqrt().item(),
    )
    return dict(zip(names, of_all, strict=True))


@dataclass(frozen=True)
class BesideSGD:
    """SGD on the examples of each prompt, beside reading them; made by :func:`compare_with_sgd`.

    Attributes:
        loss: squared error at the query after 0 … n of its steps.
        cosine: of the sum of its steps and the implicit update of the whole prompt.
        ceiling: what that cosine can be at most: the share of the sum that the query's $a_0$ sees.
    """

    loss: Estimate
    cosine: Estimate
    ceiling: Estimate


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
        )
    return compared


def ranks_from_left(block: ContextualBlock, prompts: Prompts) -> Estimate:
    """The numerical rank of $P_i - W$ after each token eaten from the left, tokens 0 … n."""
    eaten = eaten_from_left(block, prompts.context, prompts.query)
    count = prompts.context.shape[-2]
    return estimate(torch.stack([eaten.after(i).rank() for i in range(count + 1)], dim=-1).double())


def recurrent_block(dim: int = 3, hidden: int = 32, mlp: int = 128) -> ContextualBlock:
    """A contextual block like the transformer's, whose contextual layer is a GRU."""
    layers = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(), nn.Linear(mlp, dim))
    return ContextualBlock(GRU(dim, hidden), layers)
