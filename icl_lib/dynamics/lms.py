r"""Reading a prompt is normalised least mean squares (LMS), where the contextual layer is a running average.

For one head, $a_i = a_{i-1} + \alpha_i (v_i - a_{i-1})$ turns the step of token $i$ into

$$W_i = W_{i-1} - \frac{\alpha_i}{\lVert a_0 \rVert^2}\, \nabla \ell_i(W_{i-1}), \qquad
  \ell_i(U) = \tfrac12 \lVert U a_0 - W v_i \rVert^2 ,$$

a step of normalised LMS. The loss is quadratic. Its minimum is at weights that map $a_0$ to $W v_i$, the image of the
token's value; the attention weight $\alpha_i$ sets the learning rate. With several heads the step is a sum of one such
step for each head, on the loss $\ell_i^h(U) = \tfrac12 \lVert U a_0 - W(a_{i-1} - a_{i-1}^h + v_i^h) \rVert^2$. The
target of head $h$ is the image of the activation in which this head reads token $i$ alone and the other heads are
unchanged.

This holds where a new token leaves the query, the earlier keys and the earlier values as they were: in the first block,
for a layer whose positions do not shift. Derived in :func:`icl_lib.symbolic.normalised_lms` and
:func:`icl_lib.symbolic.normalised_lms_heads`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icl_lib.dynamics.path import Trajectory
from icl_lib.validation import require_instance


@dataclass(frozen=True, eq=False)
class NormalisedLMS:
    r"""The losses of the tokens and the steps on them; made by :func:`normalised_lms`.

    Attributes:
        rates: $\alpha_i^h$, the fraction of the way to the value, ``[*batch, n, heads]``.
        step_sizes: $\alpha_i^h / \lVert a_0 \rVert^2$, the learning rates, of the same shape.
        targets: $W(a_{i-1} - a_{i-1}^h + v_i^h)$, the targets for $U a_0$: ``[*batch, n, heads, out]``.
        before, after: $\ell_i^h(W_{i-1})$ and $\ell_i^h(W_i)$, ``[*batch, n, heads]``. For one head, the step
            multiplies the loss by $(1 - \alpha_i)^2$.
        marginal_norms: $\lVert \sum_h \alpha_i^h W (v_i^h - a_{i-1}^h) \rVert / \lVert a_0 \rVert$, ``[*batch, n]``:
            the predicted norms of the increments.
    """

    rates: Tensor
    step_sizes: Tensor
    targets: Tensor
    before: Tensor
    after: Tensor
    marginal_norms: Tensor


def normalised_lms(path: Trajectory) -> NormalisedLMS:
    """The quadratic loss, the target and the learning rate of each token of a prompt; see :mod:`icl_lib.dynamics.lms`.

    The losses are taken at the weights $W_{i-1}$ and $W_i$.

    Raises `ValueError` for a trajectory through a layer that is not a running average, such as a GRU, or attention
    whose positions shift when a token is appended; the message gives the reason.

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
    require_instance("path", path, Trajectory, "give what icl_lib.dynamics.trajectory returns.")
    average = path.prefixes.average
    if average is None:
        raise ValueError(
            f"path is not a run of normalised LMS: {path.prefixes.why_not}. Its updates are exact nevertheless. If the "
            "layer is an average over tokens, give it a method `average(context, query)` that returns a RunningAverage."
        )
    with torch.no_grad():
        start = path.activations[..., 0, :]
        # W(v − a) for each head: the difference between its target and its present output.
        gap = average.read_each(average.values - average.heads()[..., :-1, :, :]) @ path.weight.mT
        outputs = start.unsqueeze(-2) @ path.weight.mT + path.updates.matvec(start.unsqueeze(-2))  # of W_0 … W_n
        targets = (path.activations[..., :-1, :] @ path.weight.mT).unsqueeze(-2) + gap
        before, after = (
            (outputs[..., steps, :].unsqueeze(-2) - targets).square().sum(-1) / 2
            for steps in (slice(None, -1), slice(1, None))
        )
        moved = (average.rates.unsqueeze(-1) * gap).sum(-2)
        return NormalisedLMS(
            rates=average.rates,
            step_sizes=average.rates * path.step_size[..., None, None],
            targets=targets,
            before=before,
            after=after,
            marginal_norms=torch.linalg.vector_norm(moved, dim=-1) / torch.linalg.vector_norm(start, dim=-1)[..., None],
        )
