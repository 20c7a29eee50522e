"""Layers of linear attention, trained on the regression prompts of von Oswald et al., or on Gaussian ones."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.constructions.gradient_descent import LinearSelfAttention
from icl_lib.constructions.preconditioning import descent_error, require_covariance
from icl_lib.validation import require_size


def regression_prompts(
    count: int, examples: int, features: int, generator: torch.Generator
) -> tuple[Float[Tensor, "count examples dim"], Float[Tensor, "count dim"], Float[Tensor, " count"]]:
    r"""Draw contexts of tokens $(x_i, \langle w, x_i \rangle)$, queries $(x, 0)$, and targets $\langle w, x \rangle$.

    Each prompt has its own task $w \sim N(0, I)$; the inputs are uniform on $[-1, 1]^d$. Source: von Oswald et al.
    (arXiv 2212.07677, version 2).

    Shapes: ``[count, examples, features + 1]``, ``[count, features + 1]``, ``[count]``, in float64. Raises `ValueError`
    for a size that is not a positive whole number.

    >>> context, query, target = regression_prompts(2, 3, 4, torch.Generator().manual_seed(0))
    >>> context.shape, query.shape, target.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 5]), torch.Size([2]))
    """
    for name, size in (("count", count), ("examples", examples), ("features", features)):
        require_size(name, size)
    x = 2 * torch.rand(count, examples + 1, features, generator=generator, dtype=torch.float64) - 1
    return _prompts(x, torch.randn(count, features, generator=generator, dtype=torch.float64))


def gaussian_prompts(
    count: int,
    examples: int,
    covariance: Float[Tensor, "d d"],
    generator: torch.Generator,
    tasks: Float[Tensor, "d d"] | None = None,
) -> tuple[Float[Tensor, "count examples dim"], Float[Tensor, "count dim"], Float[Tensor, " count"]]:
    r"""Draw prompts as :func:`regression_prompts` does, with inputs from $N(0, \Sigma)$ and tasks from $N(0, \Omega)$.

    Source: Ahn et al. (arXiv 2306.00297), who take $\Omega = I$ for one layer, and $\Omega = \Sigma^{-1}$ for several.

    Args:
        count, examples: the number of prompts, and of examples in each.
        covariance: $\Sigma$, ``[d, d]``.
        generator: the source of the random numbers.
        tasks: $\Omega$, ``[d, d]``; default the identity.

    Raises `ValueError` for a size that is not a positive whole number, or a covariance that is not symmetric and
    positive definite.

    >>> context, query, target = gaussian_prompts(2, 3, torch.eye(4), torch.Generator().manual_seed(0))
    >>> context.shape, query.shape, target.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 5]), torch.Size([2]))
    """
    for name, size in (("count", count), ("examples", examples)):
        require_size(name, size)
    require_covariance("covariance", covariance)
    tasks = torch.eye(len(covariance)) if tasks is None else tasks
    require_covariance("tasks", tasks)

    def normal(*shape: int, like: Tensor) -> Tensor:
        white = torch.randn(*shape, len(covariance), generator=generator, dtype=torch.float64)
        return white @ torch.linalg.cholesky(like.double()).mT

    return _prompts(normal(count, examples + 1, like=covariance), normal(count, like=tasks))


def _prompts(x: Tensor, task: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts, query tokens and targets, from inputs ``[count, examples + 1, d]`` and tasks ``[count, d]``."""
    y = (x @ task.unsqueeze(-1)).squeeze(-1)
    tokens = torch.cat([x, y.unsqueeze(-1)], dim=-1)
    query = torch.cat([x[:, -1], torch.zeros_like(y[:, -1:])], dim=-1)
    return tokens[:, :-1], query, y[:, -1]


def train_linear_attention(
    examples: int,
    features: int,
    steps: int = 1500,
    batch: int = 512,
    learning_rate: float = 5e-3,
    seed: int = 0,
    covariance: Float[Tensor, "d d"] | None = None,
    decay: bool = False,
) -> tuple[LinearSelfAttention, LinearSelfAttention]:
    r"""Train one layer on regression prompts, and return it with the untrained layer that it started from.

    The prompts are :func:`regression_prompts`, or, with a covariance, :func:`gaussian_prompts`. The loss is the mean
    squared error of the prediction, minus the last entry of the query token. Adam gets new prompts at every step; with
    ``decay`` its rate falls to zero along a cosine. All weights are trained; they start normal with standard deviation
    $0.1$.

    Raises `ValueError` for a size that is not a positive whole number, or a covariance of another size.

    >>> trained, untrained = train_linear_attention(examples=4, features=2, steps=3, batch=8)
    >>> bool((trained.value.weight == untrained.value.weight).all())
    False
    """
    for name, size in (("examples", examples), ("features", features), ("steps", steps), ("batch", batch)):
        require_size(name, size)
    if covariance is not None and covariance.shape != (features, features):
        raise ValueError(
            f"covariance has shape {tuple(covariance.shape)}: give {features, features}, for the features."
        )
    generator = torch.Generator().manual_seed(seed)
    layer, start = (LinearSelfAttention(features + 1).double() for _ in range(2))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    start.load_state_dict(layer.state_dict())
    optimiser = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: (1 + math.cos(math.pi * step / steps)) / 2 if decay else 1.0
    )
    for _ in range(steps):
        context, query, target = (
            regression_prompts(batch, examples, features, generator)
            if covariance is None
            else gaussian_prompts(batch, examples, covariance, generator)
        )
        optimiser.zero_grad()
        (layer(context, query)[:, -1] + target).square().mean().backward()
        optimiser.step()
        schedule.step()
    return layer.requires_grad_(False), start.requires_grad_(False)


def train_preconditioners(
    layers: int,
    covariance: Float[Tensor, "d d"],
    examples: int,
    tasks: Float[Tensor, "d d"] | None = None,
    steps: int = 1500,
    batch: int = 256,
    learning_rate: float = 0.1,
    seed: int = 0,
    every: int = 25,
) -> tuple[list[int], Float[Tensor, "records layers d d"]]:
    r"""Train the matrices $A_l$ of several layers that make steps of gradient descent, and return their history.

    At each step Adam gets new contexts. The error at the query is averaged over the query and the task, which can be
    done exactly: for a context with $\hat\Sigma$ it is $\operatorname{tr}(\Omega E\, \Sigma E^\top)$ with the matrix
    $E$ of :func:`~icl_lib.constructions.descent_error`. The rate decays to zero along a cosine. The matrices start
    normal with standard deviation $0.01$, and nothing ties them to $\Sigma$. Source: Ahn et al. (arXiv 2306.00297), who
    train with sampled queries and tasks.

    Args:
        layers, examples, steps, batch: sizes.
        covariance: $\Sigma$, of the inputs.
        tasks: $\Omega$, of the tasks; default the identity.
        learning_rate: Adam's, at the beginning.
        seed: the seed of the first matrices and of all contexts.
        every: steps between two records.

    Returns the steps of the records, and the matrices then; the last record is the end of training. Raises `ValueError`
    for a size that is not a positive whole number, or a matrix that is no covariance.

    >>> steps, history = train_preconditioners(2, torch.eye(3).double(), examples=5, steps=4, batch=8, every=2)
    >>> steps, history.shape
    ([0, 2, 4], torch.Size([3, 2, 3, 3]))
    """
    for name, size in (
        ("layers", layers),
        ("examples", examples),
        ("steps", steps),
        ("batch", batch),
        ("every", every),
    ):
        require_size(name, size)
    require_covariance("covariance", covariance)
    tasks = torch.eye(len(covariance)).to(covariance) if tasks is None else tasks
    require_covariance("tasks", tasks)
    inputs, weights = (torch.linalg.cholesky(matrix.double()) for matrix in (covariance, tasks))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, len(covariance), generator=generator, dtype=torch.float64)

    matrices = (0.01 * normal(layers, len(covariance))).requires_grad_()
    optimiser = torch.optim.Adam([matrices], lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    records = {0: matrices.detach().clone()}
    for step in range(1, steps + 1):
        x = normal(batch, examples) @ inputs.mT
        left = weights.mT @ descent_error(list(matrices), x.mT @ x / examples) @ inputs
        optimiser.zero_grad()
        left.square().sum((-2, -1)).mean().backward()
        optimiser.step()
        schedule.step()
        if step % every == 0 or step == steps:
            records[step] = matrices.detach().clone()
    return list(records), torch.stack(list(records.values()))
