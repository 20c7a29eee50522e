r"""Heads of linear attention with merged or with separate keys and queries, and how they learn from small weights.

The prompts are those of a regression: a context of tokens $(x_n, y_n)$ and a query token $(x, 0)$. Source: Zhang et
al., *Training dynamics of in-context learning in linear attention* (arXiv 2501.16265, version 2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_lib.blocks.contextual import require_layer_prompt
from icl_lib.constructions.preconditioning import require_covariance
from icl_lib.validation import require_float, require_instance, require_size


class LinearHeads(nn.Module):
    r"""Several heads of linear attention with a residual connection, their keys and queries merged or separate.

    $$A(C, q) = q + \frac1N \sum_h V_h \sum_{n=1}^{N} c_n\, c_n^\top M_h\, q, \qquad
      M_h = W^{KQ}_h \;\text{ or }\; M_h = (W^K_h)^\top W^Q_h .$$

    With ``rank=None`` each head has one matrix $W^{KQ}_h$ for its keys and queries; with a rank, its $W^K_h$ and
    $W^Q_h$ are ``[rank, dim]``. Only those weights are trained that a prediction of the last entry needs: the corner
    $v_h$ of $V_h$, and the part $U_h$ of $M_h$ that reads inputs. The others are zero, and stay zero under the expected
    gradient. So the prediction is

    $$\hat y = \beta^\top M\, x, \qquad M = \sum_h v_h U_h, \qquad \beta = \frac1N \sum_n y_n x_n .$$

    Source: Zhang et al. (arXiv 2501.16265, version 2). (They also let the query token be read; at these weights it
    contributes zero.)

    Shapes: ``context`` ``[*batch, n, features + 1]``, ``query`` ``[*batch, features + 1]``; ``corner`` ``[heads]``;
    merged, ``scores`` ``[heads, features, features]``; separate, ``key`` and ``query`` ``[heads, rank, features]``.

    Raises `ValueError` for a size that is not a positive whole number, and for a prompt of another width, dtype or
    device.

    >>> layer = LinearHeads(features=2, heads=3).double()
    >>> context, query = torch.randn(5, 3).double(), torch.tensor([1.0, 2.0, 0.0]).double()
    >>> beta = context[:, :2].T @ context[:, 2] / 5
    >>> bool(torch.isclose(layer(context, query)[2], beta @ layer.matrix() @ query[:2]))
    True
    """

    def __init__(self, features: int, heads: int, rank: int | None = None, scale: float = 1e-2, seed: int = 0) -> None:
        super().__init__()
        for name, size in (("features", features), ("heads", heads), ("rank", 1 if rank is None else rank)):
            require_size(name, size)
        self.dim, self.features, self.heads, self.rank = features + 1, features, heads, rank
        generator = torch.Generator().manual_seed(seed)

        def small(*shape: int) -> nn.Parameter:
            return nn.Parameter(scale * torch.randn(*shape, generator=generator, dtype=torch.float64).float())

        self.corner = small(heads)
        if rank is None:
            self.scores = small(heads, features, features)
        else:
            self.key, self.query = small(heads, rank, features), small(heads, rank, features)

    def key_query(self) -> Float[Tensor, "heads features features"]:
        """The part of each head's key–query matrix that reads inputs, $U_h$."""
        return self.scores if self.rank is None else self.key.mT @ self.query

    def matrix(self) -> Float[Tensor, "features features"]:
        r"""The matrix $M = \sum_h v_h U_h$ of the prediction $\hat y = \beta^\top M\, x$."""
        return torch.einsum("h,hij->ij", self.corner, self.key_query())

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The query token after the layer; its last entry is the prediction."""
        require_layer_prompt(self, context, query)
        inner = nn.functional.pad(self.key_query(), (0, 1, 0, 1))  # [heads, dim, dim], zero where a target is read
        value = torch.zeros(self.heads, self.dim, self.dim).to(query)
        value[:, -1, -1] = self.corner
        scores = torch.einsum("...ni,hij,...j->...hn", context, inner, query)
        return query + torch.einsum("hij,...nj,...hn->...i", value, context, scores) / context.shape[-2]


def cubic_features(
    context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch features_squared"]:
    r"""The features $z = \operatorname{vec}(\beta\, x^\top)$ with $\beta = \frac1N \sum_n y_n x_n$; cubic in a prompt.

    Source: Zhang et al. (arXiv 2501.16265, version 2).

    Shapes: ``context`` ``[*batch, n, features + 1]``, ``query`` ``[*batch, features + 1]``; the result is
    ``[*batch, features²]``.

    >>> cubic_features(torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([1.0, 10.0, 0.0]))
    tensor([ 10., 100.,  15., 150.])
    """
    require_float("context", context, 2, "[*batch, n, features + 1]")
    beta = torch.einsum("...nd,...n->...d", context[..., :-1], context[..., -1]) / context.shape[-2]
    return (beta.unsqueeze(-1) * query[..., None, :-1]).flatten(-2)


def cubic_mlp(layer: LinearHeads) -> nn.Sequential:
    r"""The two-layer linear network on :func:`cubic_features` that is the same function as merged heads.

    Its first layer has a row $\operatorname{vec}(U_h)$ for each head, and its second the entries $v_h$. It has the same
    parameters, so its gradients are the same too. Source: Zhang et al. (arXiv 2501.16265, version 2).

    Raises `ValueError` for a layer whose keys and queries are separate.

    >>> layer = LinearHeads(features=2, heads=3)
    >>> context, query = torch.randn(5, 3), torch.tensor([1.0, 2.0, 0.0])
    >>> torch.allclose(cubic_mlp(layer)(cubic_features(context, query)), layer(context, query)[2:], atol=1e-6)
    True
    """
    require_instance("layer", layer, LinearHeads, "give heads of linear attention.")
    if layer.rank is not None:
        raise ValueError(f"layer has rank={layer.rank}, separate keys and queries: give one with rank=None.")
    first, second = nn.Linear(layer.features**2, layer.heads, bias=False), nn.Linear(layer.heads, 1, bias=False)
    network = nn.Sequential(first, second).to(layer.corner)
    with torch.no_grad():
        first.weight.copy_(layer.scores.flatten(1))
        second.weight.copy_(layer.corner.unsqueeze(0))
    return network


def loss_on(
    context: Float[Tensor, "count n dim"], query: Float[Tensor, "count dim"], target: Float[Tensor, " count"]
) -> Callable[[Tensor], Tensor]:
    r"""The mean squared error on given prompts as a function of the matrix $M$ of the prediction.

    The prediction is linear in $M$, so the prompts enter by two moments of their :func:`cubic_features` only. Training
    on a hundred thousand prompts then costs as little as training on one, and has the same gradients.

    >>> layer = LinearHeads(features=2, heads=3).double()
    >>> prompts = [torch.randn(9, *shape).double() for shape in ((5, 3), (3,), ())]
    >>> direct = (layer(*prompts[:2])[:, -1] - prompts[1][:, -1] - prompts[2]).square().mean()
    >>> bool(torch.isclose(loss_on(*prompts)(layer.matrix()), direct))
    True
    """
    features = cubic_features(context, query)
    squares, products = features.mT @ features / len(features), features.mT @ target / len(features)
    constant = target.square().mean()

    def loss(matrix: Tensor) -> Tensor:
        entries = matrix.flatten()
        return constant - 2 * products @ entries + entries @ squares @ entries

    return loss


def descend(
    layer: LinearHeads, loss: Callable[[Tensor], Tensor], step: float, steps: int
) -> Iterator[tuple[float, Float[Tensor, "features features"]]]:
    r"""Train a layer by gradient descent on half of a loss of its matrix $M$; yield the time and $M$ before each step.

    The time is the number of steps times their size, so that small steps follow the gradient flow $\dot\theta =
    -\tfrac12 \nabla_\theta L$. The layer is changed in place. After the last step the end is yielded too.

    >>> layer = LinearHeads(features=2, heads=1, scale=0.1)
    >>> times = [time for time, matrix in descend(layer, lambda M: (M - torch.eye(2)).square().sum(), 0.5, steps=3)]
    >>> times
    [0.0, 0.5, 1.0, 1.5]
    """
    require_instance("layer", layer, LinearHeads, "give heads of linear attention.")
    require_size("steps", steps)
    parameters = list(layer.parameters())
    for number in range(steps + 1):
        matrix = layer.matrix()
        yield number * step, matrix.detach()
        if number < steps:
            slopes = torch.autograd.grad(loss(matrix), parameters)
            with torch.no_grad():
                for parameter, slope in zip(parameters, slopes, strict=True):
                    parameter -= step / 2 * slope


def merged_time_course(
    times: Float[Tensor, " times"], features: int, examples: int, strength: float
) -> Float[Tensor, " times"]:
    r"""How merged heads learn from white inputs: $M = \sigma(t)\, I$, a logistic curve.

    $$\sigma(t) = \frac{e^{2 \sqrt D\, t}}{\bigl(1 + \frac{1 + D}{N}\bigr) \bigl(e^{2 \sqrt D\, t} - 1\bigr)
      + \frac{\sqrt D}{w^2}}$$

    for the gradient flow of half the expected squared error, with $x \sim N(0, I)$ and $w^2$ the strength of the first
    weights (:func:`initial_strength`). Source: Zhang et al. (arXiv 2501.16265, version 2), with their time constant
    $\tau = 1$. Derived in :func:`icl_lib.symbolic.merged_time_course`.

    Shapes: ``times`` and the result ``[times]``. Raises `ValueError` for a size that is not a positive whole number, or
    a strength that is not positive.

    >>> merged_time_course(torch.tensor([0.0, 100.0]).double(), features=4, examples=10, strength=0.02)
    tensor([0.0100, 0.6667], dtype=torch.float64)
    """
    require_float("times", times, 1, "[times]")
    for name, size in (("features", features), ("examples", examples)):
        require_size(name, size)
    if not strength > 0:
        raise ValueError(f"strength is {strength!r}: give a positive number.")
    shrunk = torch.exp(-2 * math.sqrt(features) * times)  # divided by the exponential, which overflows
    return 1 / ((1 + (1 + features) / examples) * (1 - shrunk) + math.sqrt(features) / strength * shrunk)


def initial_strength(layer: LinearHeads) -> float:
    r"""The strength $w^2$ of small merged weights: the squared length of their part that grows.

    $$w^2 = \sum_h \Bigl(\frac{v_h + \operatorname{tr}(U_h) / \sqrt D}{2}\Bigr)^2$$

    Near zero the flow of :func:`merged_time_course` is linear, $\dot v_h = \operatorname{tr} U_h$ and $\dot U_h = v_h
    I$. Of $v_h$ and $\operatorname{tr}(U_h) / \sqrt
    D$ the half sum grows, and their half difference decays. Source: this book; Zhang et al. start with both equal.

    >>> layer = LinearHeads(features=4, heads=1)
    >>> _ = layer.corner.data.fill_(0.1), layer.scores.data.copy_(0.05 * torch.eye(4))
    >>> round(initial_strength(layer), 6)
    0.01
    """
    require_instance("layer", layer, LinearHeads, "give heads of linear attention.")
    traces = layer.key_query().diagonal(dim1=-2, dim2=-1).sum(-1) / math.sqrt(layer.features)
    return ((layer.corner + traces) / 2).square().sum().item()


def plateau_losses(covariance: Float[Tensor, "d d"], examples: int) -> Float[Tensor, " plateaus"]:
    r"""The expected squared errors at which separate rank-one heads pause, the first ones first.

    $$L(M_m) = \operatorname{tr} \Sigma - \sum_{i \le m} \lambda_i
      \Bigl(1 + \frac{1 + \operatorname{tr}(\Sigma) / \lambda_i}{N}\Bigr)^{-1}, \qquad m = 0, \dots, D,$$

    with the eigenvalues $\lambda_1 \ge \lambda_2 \ge \dots$ of $\Sigma$. $M_m$ is
    :func:`~icl_lib.constructions.one_layer_optimum`, restricted to the first $m$ eigenvectors: a regression on $m$
    principal components. Source: Zhang et al. (arXiv 2501.16265, version 2).

    Shapes: ``covariance`` ``[d, d]``; the result is ``[d + 1]``. Raises `ValueError` for a covariance that is not
    symmetric and positive definite.

    >>> plateau_losses(torch.diag(torch.tensor([0.5, 0.25])), examples=10)
    tensor([0.7500, 0.3500, 0.1714])
    """
    require_covariance("covariance", covariance)
    require_size("examples", examples)
    values = torch.linalg.eigvalsh(covariance).flip(0)
    total = values.sum()
    learned = values / (1 + (1 + total / values) / examples)
    return torch.cat([total[None], total - learned.cumsum(0)])


def pauses(losses: Float[Tensor, " times"]) -> Int[Tensor, " pauses"]:
    r"""Where a falling loss is slowest: the positions at which its speed has a local minimum.

    A loss in rounding error of its end has more of them, so give the part before.

    >>> pauses(torch.tensor([9.0, 6.0, 5.0, 4.9, 4.0, 2.0, 1.0]))
    tensor([3])
    """
    require_float("losses", losses, 1, "[times]")
    speed = losses[:-1] - losses[1:]
    slowest = (speed[1:-1] < speed[:-2]) & (speed[1:-1] <= speed[2:])
    return slowest.nonzero().flatten() + 2
