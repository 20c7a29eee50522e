r"""A block that reads its prompts token by token: how far each token moves the weights, where to, and what for.

The experiments of Dherin et al. (arXiv 2507.16003), Figures 3 and 4, and the cosines and the recurrent layer of their
later version (v4), each with what theory predicts beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.block import ContextualBlock
from icl_lib.contextual import GRU
from icl_lib.dynamics.from_left import eaten_from_left
from icl_lib.dynamics.lms import normalised_lms
from icl_lib.dynamics.path import trajectory
from icl_lib.dynamics.task import answers, step_alignment
from icl_lib.experiments.one_block import relative_difference
from icl_lib.fine_tuning import fine_tune, fine_tuned_losses
from icl_lib.regression import Prompts, prediction
from icl_lib.theorem import alignment


class Estimate(NamedTuple):
    """A mean over prompts and its standard error: numbers, or arrays with one entry a token."""

    mean: np.ndarray | float
    error: np.ndarray | float


def estimate(values: Float[Tensor, "*prompts_and_tokens"]) -> Estimate:
    """The mean over prompts, and its standard error; what is not a number is left out.

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

    A straight line is fitted to each prompt, from token ``first`` on, so that the standard error is over prompts.

    >>> i = torch.arange(1, 101, dtype=torch.float64)
    >>> round(decay_exponent(torch.stack([1 / i, 3 / i])).mean, 12)
    -1.0
    """
    x = torch.arange(first, norms.shape[-1] + 1, dtype=torch.float64).log()
    y = norms[..., first - 1 :].detach().double().cpu().log()
    x = x - x.mean()
    return estimate((x * y).sum(-1) / x.square().sum())


@dataclass(frozen=True)
class TokenByToken:
    """What happens at each token, over prompts; made by :func:`read_token_by_token`.

    Attributes:
        norms: $\\lVert W_i - W_{i-1} \\rVert_F$, tokens 1 … n (Figure 3).
        exponent: their slope on log–log axes.
        predicted: the same norms as the running average of the layer predicts them; None for a layer without one.
        agreement: the largest relative difference of the two, over prompts and tokens; None likewise.
        loss: squared error at the query with the weights $W_i$, tokens 0 … n (Figure 4).
        exact: largest relative difference of the edited block's outputs from those of the block that reads the tokens.
        towards_answer: cosine of each step and the descent direction of the query's own loss.
        towards_example: cosine of each step and that of the loss on the example that is read, which SGD would follow.
        lms_before, lms_after: the normalised LMS loss of each token, mean over heads, before its step and after; None
            for a layer without a running average.
        rates: attention's rate for each token, mean over heads; None likewise.
    """

    norms: Estimate
    exponent: Estimate
    predicted: Estimate | None
    agreement: float | None
    loss: Estimate
    exact: float
    towards_answer: Estimate
    towards_example: Estimate
    lms_before: Estimate | None
    lms_after: Estimate | None
    rates: Estimate | None


def read_token_by_token(block: ContextualBlock, prompts: Prompts) -> TokenByToken:
    """Follow the weights of a block through each of many prompts.

    Raises `ValueError` for fewer than two prompts, of which no standard error could be given.

    >>> from icl_lib.regression import sample_prompts
    >>> reading = read_token_by_token(recurrent_block().double(), sample_prompts(4, examples=6, features=2, seed=0))
    >>> reading.norms.mean.shape, reading.loss.mean.shape, reading.predicted
    ((6,), (7,), None)
    """
    path = trajectory(block, prompts.context, prompts.query)
    norms, edited = path.marginal_norms, answers(block, path.updates, prompts.query.unsqueeze(-2))
    lms = normalised_lms(path) if path.prefixes.average is not None else None
    with torch.no_grad():
        read = block(prompts.context, prompts.query)
    examples = prompts.context.clone()
    examples[..., -1] = 0

    def squared_error(right: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda output: (prediction(output) - right).square()

    to_answer, to_example = squared_error(prompts.target.unsqueeze(-1)), squared_error(prompts.context[..., -1])
    return TokenByToken(
        norms=estimate(norms),
        exponent=decay_exponent(norms),
        predicted=estimate(lms.marginal_norms) if lms else None,
        agreement=((lms.marginal_norms - norms).abs() / norms).max().item() if lms else None,
        loss=estimate(to_answer(edited)),
        exact=relative_difference(edited[:, -1], read),
        towards_answer=estimate(step_alignment(path, block, prompts.query, to_answer)),
        towards_example=estimate(step_alignment(path, block, examples, to_example)),
        lms_before=estimate(lms.before.mean(-1)) if lms else None,
        lms_after=estimate(lms.after.mean(-1)) if lms else None,
        rates=estimate(lms.rates.mean(-1)) if lms else None,
    )


def compare_with_sgd(
    block: ContextualBlock, prompts: Prompts, learning_rates: Sequence[float]
) -> dict[float, tuple[Estimate, Estimate]]:
    """SGD on the examples of each prompt beside reading them (Figure 4), for several learning rates.

    Gives for each rate the squared error at the query after 0 … n steps, and the cosine of the sum of SGD's steps and
    the implicit update of the whole prompt.
    """
    whole = trajectory(block, prompts.context, prompts.query).updates[..., -1]
    compared = {}
    for rate in learning_rates:
        steps = fine_tune(block, prompts, rate)
        cosine = alignment(steps, whole)
        compared[rate] = estimate(fine_tuned_losses(block, prompts, steps)), estimate(cosine)
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
