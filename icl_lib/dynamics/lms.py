r"""Reading a prompt is normalised least mean squares, where the contextual layer is a running average.

For one head, $a_i = a_{i-1} + \alpha_i (v_i - a_{i-1})$ makes the step of token $i$

$$W_i = W_{i-1} - \frac{\alpha_i}{\lVert a_0 \rVert^2}\, \nabla_{W'}\, \tfrac12 \bigl\lVert W' a_0 - W v_i \bigr\rVert^2
  \Big|_{W' = W_{i-1}},$$

a step of normalised LMS (a relaxed Kaczmarz step). The loss is quadratic and made of data: token $i$ asks that the
weights send $a_0$ to where $W$ sends its value, and attention decides how far to go. With several heads there is one
such step for each, on the loss $\ell_i^h(W') = \tfrac12 \lVert W' a_0 - W(a_{i-1} - a_{i-1}^h + v_i^h) \rVert^2$: head
$h$ asks for the answer that would be given if it read token $i$ alone, and the other heads what they read before.

Derived in :func:`icl_lib.symbolic.normalised_lms` and :func:`icl_lib.symbolic.normalised_lms_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icl_lib.dynamics.path import Trajectory
from icl_lib.running_average import RunningAverage
from icl_lib.validation import validated_by


@dataclass(frozen=True, eq=False)
class NormalisedLMS:
    r"""The losses of the tokens and the steps on them; made by :func:`normalised_lms`.

    Attributes:
        rates: $\alpha_i^h$, how much of the way is gone, ``[*batch, n, heads]``.
        step_sizes: $\alpha_i^h / \lVert a_0 \rVert^2$, the learning rates, of the same shape.
        targets: what token $i$ asks that the weights answer to $a_0$, by head: ``[*batch, n, heads, out]``.
        before, after: $\ell_i^h(W_{i-1})$ and $\ell_i^h(W_i)$, ``[*batch, n, heads]``. For one head the loss falls to
            $(1 - \alpha_i)^2$ of what it was.
        marginal_norms: $\lVert \sum_h \alpha_i^h W (v_i^h - a_{i-1}^h) \rVert / \lVert a_0 \rVert$, ``[*batch, n]``:
            what the norms of the increments must be.
    """

    rates: Tensor
    step_sizes: Tensor
    targets: Tensor
    before: Tensor
    after: Tensor
    marginal_norms: Tensor


def _check_normalised_lms(path: Any) -> None:
    if not isinstance(path, Trajectory):
        raise ValueError(f"path is a {type(path).__name__}: give what icl_lib.dynamics.trajectory returns.")
    if path.prefixes.average is None:
        raise ValueError(
            f"reading this prompt is not normalised LMS: {path.prefixes.why_not}. The trajectory itself is exact; only "
            "this reading of it is not to be had. A layer that is an average over tokens can say so with a method "
            "`average(context, query)` that returns a RunningAverage."
        )


@validated_by(_check_normalised_lms)
def normalised_lms(path: Trajectory) -> NormalisedLMS:
    """The quadratic loss, the target and the learning rate of each token of a prompt; see :mod:`icl_lib.dynamics.lms`.

    The losses are those of the weights on their way, $W + ΔW_i$, applied to $a_0$.

    Raises `ValueError` for a trajectory through a layer that is no running average, such as a GRU or attention whose
    positions shift when a token is appended; it says why.

    >>> from icl_lib import ContextualBlock, SoftmaxAttention
    >>> from icl_lib.dynamics import trajectory
    >>> block = ContextualBlock(SoftmaxAttention(dim=4), torch.nn.Linear(4, 8)).double()
    >>> path = trajectory(block, torch.randn(50, 4).double(), torch.randn(4).double())
    >>> reading = normalised_lms(path)
    >>> torch.allclose(reading.marginal_norms, path.marginal_norms)
    True
    >>> torch.allclose(reading.after, (1 - reading.rates) ** 2 * reading.before)
    True
    """
    average: RunningAverage = path.prefixes.average
    with torch.no_grad():
        start = path.activations[..., 0, :]
        # v − a for each head, sent through W: how far each head asks to go.
        asked = average.read_each(average.values - average.heads()[..., :-1, :, :]) @ path.weight.mT
        answers = start.unsqueeze(-2) @ path.weight.mT + path.updates.matvec(start.unsqueeze(-2))  # of W_0 … W_n
        targets = (path.activations[..., :-1, :] @ path.weight.mT).unsqueeze(-2) + asked
        before, after = (
            (answers[..., steps, :].unsqueeze(-2) - targets).square().sum(-1) / 2
            for steps in (slice(None, -1), slice(1, None))
        )
        moved = (average.rates.unsqueeze(-1) * asked).sum(-2)
        return NormalisedLMS(
            rates=average.rates,
            step_sizes=average.rates * path.step_size[..., None, None],
            targets=targets,
            before=before,
            after=after,
            marginal_norms=torch.linalg.vector_norm(moved, dim=-1) / torch.linalg.vector_norm(start, dim=-1)[..., None],
        )
