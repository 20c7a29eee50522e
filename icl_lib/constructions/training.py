"""A layer of linear attention, trained on the regression prompts of von Oswald et al."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.constructions.gradient_descent import LinearSelfAttention
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
    task = torch.randn(count, features, generator=generator, dtype=torch.float64)
    y = (x @ task.unsqueeze(-1)).squeeze(-1)
    tokens = torch.cat([x, y.unsqueeze(-1)], dim=-1)
    query = torch.cat([x[:, -1], torch.zeros_like(y[:, -1:])], dim=-1)
    return tokens[:, :-1], query, y[:, -1]


def train_linear_attention(
    examples: int, features: int, steps: int = 1500, batch: int = 512, learning_rate: float = 5e-3, seed: int = 0
) -> tuple[LinearSelfAttention, LinearSelfAttention]:
    r"""Train one layer on :func:`regression_prompts`, and return it with the untrained layer that it started from.

    The loss is the mean squared error of the prediction, minus the last entry of the query token. Adam gets new prompts
    at every step. The weights start normal with standard deviation $0.1$.

    Raises `ValueError` for a size that is not a positive whole number.

    >>> trained, untrained = train_linear_attention(examples=4, features=2, steps=3, batch=8)
    >>> bool((trained.value.weight == untrained.value.weight).all())
    False
    """
    for name, size in (("examples", examples), ("features", features), ("steps", steps), ("batch", batch)):
        require_size(name, size)
    generator = torch.Generator().manual_seed(seed)
    layer, start = (LinearSelfAttention(features + 1).double() for _ in range(2))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    start.load_state_dict(layer.state_dict())
    optimiser = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    for _ in range(steps):
        context, query, target = regression_prompts(batch, examples, features, generator)
        optimiser.zero_grad()
        (layer(context, query)[:, -1] + target).square().mean().backward()
        optimiser.step()
    return layer.requires_grad_(False), start.requires_grad_(False)
