r"""Heads of softmax attention on noisy linear regression: two of them make a step of gradient descent.

The examples are $y_l = \langle w, x_l \rangle + \varepsilon_l$, the tokens $z_l = (x_l, y_l)$, and the query token is
$z_q = (x_q, 0)$. The layer reads the examples, not the query token, and outputs a number,

$$\hat y = \sum_h \langle V_h, \sum_{l=1}^{L} \operatorname{softmax}_l(z_l^\top S_h\, z_q)\, z_l \rangle ,$$

with a matrix $S_h$ (key and query) and a vector $V_h$ (output and value) for each head.

Source: He et al., *In-context linear regression demystified* (arXiv 2503.12734), and their code for the layer and the
data of the experiments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.contextual import require_layer_prompt
from icl_lib.validation import require_float, require_instance, require_same_kind, require_size


class SoftmaxHeads(nn.Module):
    r"""Heads of softmax attention that predict a number from examples; see :mod:`icl_lib.constructions.softmax_heads`.

    Each head has a key, a query and a value matrix and an output vector, $S_h = K_h^\top Q_h / \sqrt{\mathtt{dim}}$ and
    $V_h = W_h^\top o_h$. There is no residual connection.

    Shapes: ``context`` ``[*batch, n, dim]`` with at least one token, ``query`` ``[*batch, dim]``, the prediction
    ``[*batch]``; ``key``, ``query`` and ``value`` are ``[heads, dim, dim]``, ``output`` is ``[heads, dim]``. They start
    normal with standard deviation ``0.3``.

    Raises `ValueError` for a size that is not a positive whole number, a prompt that does not fit, or an empty context.

    >>> layer = SoftmaxHeads(dim=3, heads=2)
    >>> layer(torch.randn(5, 7, 3), torch.randn(5, 3)).shape
    torch.Size([5])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        require_size("dim", dim)
        require_size("heads", heads)
        self.dim, self.heads = dim, heads
        self.key, self.query, self.value = (nn.Parameter(0.3 * torch.randn(heads, dim, dim)) for _ in range(3))
        self.output = nn.Parameter(0.3 * torch.randn(heads, dim))

    @property
    def score_maps(self) -> Float[Tensor, "heads dim dim"]:
        r"""$S_h$: the score of a token $z$ for the query token $z_q$ is $z^\top S_h\, z_q$."""
        return self.key.mT @ self.query / math.sqrt(self.dim)

    @property
    def value_maps(self) -> Float[Tensor, "heads dim"]:
        r"""$V_h$: a head outputs the mean of $\langle V_h, z_l \rangle$ with its attention weights."""
        return (self.output.unsqueeze(-2) @ self.value).squeeze(-2)

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch"]:
        """The prediction, a sum over the heads."""
        return self.by_head(context, query).sum(-1)

    def by_head(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch heads"]:
        """What each head contributes to the prediction."""
        require_layer_prompt(self, context, query)
        if not context.shape[-2]:
            raise ValueError("context has no token, and the query does not read itself: give at least one example.")
        scores = torch.einsum("...ld,hde,...e->...hl", context, self.score_maps, query)
        return (scores.softmax(-1) @ context * self.value_maps).sum(-1)


def opposed_heads(features: int, scale: float, value: float) -> SoftmaxHeads:
    r"""Two heads with $S_h = \pm \omega I$ on the inputs and $V_h = \pm \mu$ in the place of the target.

    For a small scale $\omega$ they predict as :func:`debiased_descent` with the rate $2 \omega \mu$, up to terms of the
    order $\omega^3$. Source: He et al. (arXiv 2503.12734), the pattern that training finds.

    Args:
        features: the number of inputs; the tokens have one entry more, the target.
        scale: $\omega$, not zero.
        value: $\mu$.

    Raises `ValueError` for a size that is none, a scale of zero, and numbers that are not finite.

    >>> layer = opposed_heads(features=1, scale=0.1, value=3.0)
    >>> context, query = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([1.0, 0.0])
    >>> round(layer(context, query).item(), 3)  # 2μ tanh ω; the step of descent predicts 0.6
    0.598
    """
    require_size("features", features)
    for name, number in (("scale", scale), ("value", value)):
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"{name} is {number!r}: give a finite number.")
    if scale == 0:
        raise ValueError("scale is 0, so both heads take the plain mean and cancel: give a number that is not zero.")
    layer = SoftmaxHeads(features + 1, heads=2)
    signs = torch.tensor([1.0, -1.0])
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        inputs = torch.arange(features)
        layer.key[:, inputs, inputs] = 1.0
        layer.query[:, inputs, inputs] = scale * math.sqrt(layer.dim) * signs.unsqueeze(-1)
        layer.value[:, features, features] = 1.0
        layer.output[:, features] = value * signs
    return layer.requires_grad_(False)


def debiased_descent(
    context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"], rate: float
) -> Float[Tensor, "*batch"]:
    r"""The prediction of one step of gradient descent from zero on the centred examples.

    $$\hat y = \frac{\eta}{L} \sum_{l=1}^{L} y_l\, (x_l - \bar x)^\top x_q$$

    The step is on $\ell(w) = \frac{1}{2L} \sum_l \bigl((x_l - \bar x)^\top w - (y_l - \bar y)\bigr)^2$, the regression
    from which the means are taken out. Source: He et al. (arXiv 2503.12734). Derived in
    :func:`icl_lib.symbolic.debiased_descent`.

    Shapes: ``context`` ``[*batch, n, dim]`` with tokens $(x_l, y_l)$, ``query`` ``[*batch, dim]``, whose last entry is
    not read. Raises `ValueError` for a prompt that does not fit.

    >>> context = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    >>> debiased_descent(context, torch.tensor([1.0, 0.0]), rate=1.0)  # (0 · (−1) + 2 · 1)/2
    tensor(1.)
    """
    require_float("context", context, 2, "[*batch, n, dim]")
    require_float("query", query, 1, "[*batch, dim]")
    require_same_kind("context", context, query=query)
    inputs, targets = context[..., :-1], context[..., -1]
    slopes = (inputs - inputs.mean(-2, keepdim=True)) @ query[..., :-1].unsqueeze(-1)
    return rate * (targets * slopes.squeeze(-1)).mean(-1)


def descent_loss(examples: int, features: int, noise: float, debiased: bool = True) -> tuple[float, float]:
    r"""The expected squared error of one step of gradient descent at its best rate, and this rate.

    $$1 + \sigma^2 - \frac{L - 1}{L + (1 + \sigma^2)\, d}, \qquad \eta = \frac{L}{L + (1 + \sigma^2)\, d}$$

    for the debiased step, and for the plain step, with $x_l$ in the place of $x_l - \bar x$,

    $$1 + \sigma^2 - \frac{L}{L + 1 + (1 + \sigma^2)\, d}, \qquad \eta = \frac{L}{L + 1 + (1 + \sigma^2)\, d} .$$

    The data are those of :func:`noisy_prompts`. With $\hat y = \eta g$ the best rate is $E[g y] / E[g^2]$, and the
    moments are those of a Wishart matrix with $L - 1$, or $L$, degrees of freedom. Source: this book.

    Raises `ValueError` for a size that is not a positive whole number, or noise that is negative.

    >>> loss, rate = descent_loss(examples=40, features=5, noise=0.1)
    >>> round(loss, 4), round(rate, 4)
    (0.2429, 0.8791)
    """
    require_size("examples", examples)
    require_size("features", features)
    _require_noise(noise)
    freedom = examples - 1 if debiased else examples
    scale = freedom + 1 + (1 + noise) * features
    return 1 + noise - freedom / scale, examples / scale


def noisy_prompts(
    count: int, examples: int, features: int, noise: float, generator: torch.Generator
) -> tuple[Float[Tensor, "count examples dim"], Float[Tensor, "count dim"], Float[Tensor, " count"]]:
    r"""Draw contexts of tokens $(x_l, \langle w, x_l \rangle + \varepsilon_l)$, queries $(x_q, 0)$ and their targets.

    $x_l \sim N(0, I)$, $w \sim N(0, I/d)$, $\varepsilon_l \sim N(0, \sigma^2)$; the query's target is noisy as well.
    Source: He et al. (arXiv 2503.12734) and their code.

    Shapes: ``[count, examples, features + 1]``, ``[count, features + 1]``, ``[count]``, in float64. ``noise`` is the
    variance $\sigma^2$. Raises `ValueError` for a size that is not a positive whole number, or noise that is negative.

    >>> context, query, target = noisy_prompts(2, 3, 4, 0.1, torch.Generator().manual_seed(0))
    >>> context.shape, query.shape, target.shape
    (torch.Size([2, 3, 5]), torch.Size([2, 5]), torch.Size([2]))
    """
    for name, size in (("count", count), ("examples", examples), ("features", features)):
        require_size(name, size)
    _require_noise(noise)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs, tasks = normal(count, examples + 1, features), normal(count, features, 1) / math.sqrt(features)
    targets = inputs @ tasks + math.sqrt(noise) * normal(count, examples + 1, 1)
    tokens = torch.cat([inputs, targets], dim=-1)
    query = torch.cat([inputs[:, -1], torch.zeros_like(targets[:, -1])], dim=-1)
    return tokens[:, :-1], query, targets[:, -1, 0]


@dataclass(frozen=True, eq=False)
class HeadPatterns:
    r"""What the heads of a layer have learned; made by :func:`head_patterns`.

    Attributes:
        scales: $\omega_h$, the mean of the diagonal of $S_h$ on the inputs, ``[heads]``.
        values: $\mu_h$, the entry of $V_h$ for the target, ``[heads]``.
        diagonal: the share of $\omega_h I$ in the squared norm of $S_h$ (without its last
            column, which a query token does not reach), ``[heads]``.
        target: the share of $\mu_h$ in the squared norm of $V_h$, ``[heads]``.
    """

    scales: Tensor
    values: Tensor
    diagonal: Tensor
    target: Tensor


def head_patterns(layer: SoftmaxHeads) -> HeadPatterns:
    r"""The scale and the value of each head, and how much of its matrices they are.

    >>> patterns = head_patterns(opposed_heads(features=2, scale=0.5, value=3.0))
    >>> [round(scale, 6) for scale in patterns.scales.tolist()], patterns.values.tolist(), patterns.target.tolist()
    ([0.5, -0.5], [3.0, -3.0], [1.0, 1.0])
    """
    require_instance("layer", layer, SoftmaxHeads, "give a SoftmaxHeads, such as train_softmax_heads returns.")
    with torch.no_grad():
        reached, values = layer.score_maps[:, :, :-1], layer.value_maps
        scales = reached[:, :-1].diagonal(dim1=-2, dim2=-1).mean(-1)
        return HeadPatterns(
            scales=scales,
            values=values[:, -1],
            diagonal=scales.square() * (layer.dim - 1) / reached.square().sum((-2, -1)),
            target=values[:, -1].square() / values.square().sum(-1),
        )


def train_softmax_heads(
    heads: int,
    examples: int,
    features: int,
    noise: float = 0.1,
    steps: int = 1500,
    batch: int = 128,
    learning_rate: float = 1e-2,
    seed: int = 0,
) -> tuple[SoftmaxHeads, SoftmaxHeads]:
    r"""Train a layer on :func:`noisy_prompts`, and return it with the untrained layer that it started from.

    The loss is the mean squared error. Adam gets new prompts at every step, and its rate falls linearly to zero. It
    trains in float32, and the layers are returned in float64.

    Raises `ValueError` for a size that is not a positive whole number, or noise that is negative.

    >>> trained, untrained = train_softmax_heads(heads=2, examples=4, features=2, steps=3, batch=8)
    >>> bool((trained.key == untrained.key).all())
    False
    """
    for name, size in (("steps", steps), ("batch", batch)):
        require_size(name, size)
    generator = torch.Generator().manual_seed(seed)
    layer, start = (SoftmaxHeads(features + 1, heads) for _ in range(2))
    for weight in layer.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    start.load_state_dict(layer.state_dict())
    optimiser = torch.optim.Adam(layer.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    for _ in range(steps):
        context, query, target = (part.float() for part in noisy_prompts(batch, examples, features, noise, generator))
        optimiser.zero_grad()
        (layer(context, query) - target).square().mean().backward()
        optimiser.step()
        schedule.step()
    return layer.double().requires_grad_(False), start.double().requires_grad_(False)


def _require_noise(noise: float) -> None:
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise!r}: give the variance, a finite number of at least 0.")
