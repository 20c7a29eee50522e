r"""A layer of linear self-attention whose weights make it a step of gradient descent.

The tokens are pairs $e_j = (x_j, y_j)$ of an input and its target. The layer adds to every token what this token reads
from the context,

$$e_j \leftarrow e_j + P \sum_{i=1}^{N} W_V e_i \, (W_K e_i)^\top W_Q e_j .$$

Source: von Oswald et al., *Transformers learn in-context by gradient descent* (arXiv 2212.07677, version 2),
Proposition 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icl_lib.blocks.contextual import require_layer_prompt
from icl_lib.blocks.running_average import RunningAverage
from icl_lib.validation import require_finite, require_float, require_instance, require_same_kind, require_size


class LinearSelfAttention(nn.Module):
    r"""One head of linear self-attention with a residual connection; the context is read, the query reads.

    $$A(C, q) = q + P \sum_{i=1}^{n} W_V c_i\, (W_K c_i)^\top W_Q q$$

    Without a context it is the identity, $A(q) = q$. The sum is not normalised. With ``mean=True`` it is divided by
    $n + 1$, as in :class:`~icl_lib.blocks.contextual.LinearAttention`; the query counts, and contributes zero. Source:
    von Oswald et al. (arXiv 2212.07677, version 2).

    Shapes: ``context`` ``[*batch, n, dim]``, ``query`` ``[*batch, dim]``; ``key``, ``query``, ``value`` and ``output``
    are linear maps with weights ``[dim, dim]``, the paper's $W_K$, $W_Q$, $W_V$ and $P$.

    Raises `ValueError` for a size that is not a positive whole number, and for a prompt of another width, dtype or
    device.

    >>> layer = LinearSelfAttention(dim=3).double()
    >>> context, query = torch.randn(5, 3).double(), torch.randn(3).double()
    >>> torch.equal(layer(context[:0], query), query)
    True
    """

    def __init__(self, dim: int, mean: bool = False) -> None:
        super().__init__()
        require_size("dim", dim)
        if not isinstance(mean, bool):
            raise ValueError(f"mean is {mean!r}: give True or False.")
        self.dim, self.mean = dim, mean
        self.key, self.query, self.value, self.output = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if mean:  # only then is the layer a running average
            self.average = self._average

    def forward(
        self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
    ) -> Float[Tensor, "*batch dim"]:
        """The query token after the layer."""
        return self.update(context, query.unsqueeze(-2)).squeeze(-2)

    def update(
        self, context: Float[Tensor, "*batch n dim"], tokens: Float[Tensor, "*batch m dim"]
    ) -> Float[Tensor, "*batch m dim"]:
        """The given tokens after the layer, each of which reads the context.

        >>> layer, context = LinearSelfAttention(dim=3), torch.randn(5, 3)
        >>> torch.allclose(layer.update(context, context)[2], layer(context, context[2]), atol=1e-6)
        True
        """
        require_float("tokens", tokens, 2, "[*batch, m, dim]")
        require_layer_prompt(self, context, tokens[..., 0, :])
        scores = self.query(tokens) @ self.key(context).mT
        count = context.shape[-2] + 1 if self.mean else 1
        return tokens + self.output(scores @ self.value(context)) / count

    def _average(self, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]) -> RunningAverage:
        r"""The running average over $q + P\, W_V c_i (W_K c_i)^\top W_Q q$, with the query's own value $q$ first."""
        require_layer_prompt(self, context, query)
        scores = self.key(context) @ self.query(query).unsqueeze(-1)
        values = query.unsqueeze(-2) + scores * self.output(self.value(context))
        rates = 1 / torch.arange(2, context.shape[-2] + 2, dtype=query.dtype, device=query.device)
        rates = rates.unsqueeze(-1).expand(*values.shape[:-1], 1)
        return RunningAverage(rates, values.unsqueeze(-2), query.unsqueeze(-2))


def gradient_descent_attention(
    initial: Float[Tensor, "out in_"],
    step_size: float,
    examples: int,
    curvature: float = 0.0,
    mean: bool = False,
    preconditioner: Float[Tensor, "in_ in_"] | None = None,
) -> LinearSelfAttention:
    r"""The layer that makes one step of gradient descent on the regression in its context.

    $$W_K = W_Q = \begin{pmatrix} I & 0 \\ 0 & 0 \end{pmatrix}, \qquad
      W_V = \begin{pmatrix} 0 & 0 \\ W_0 & -I \end{pmatrix}, \qquad P = \frac{\eta}{N} I .$$

    A token $(x_j, y_j)$ becomes $(x_j, y_j - (W_1 - W_0)\, x_j)$ with

    $$W_1 = W_0 - \eta \nabla L(W_0), \qquad L(W) = \frac{1}{2N} \sum_{i=1}^{N} \lVert W x_i - y_i \rVert^2 .$$

    The query token is $(x, -W_0 x)$ and becomes $(x, -W_1 x)$, so the prediction is its second part times $-1$. The
    targets left in the context are those of a regression from $W_0$ whose residuals are those of $W_1$; so the same
    layer, applied $k$ times to every token (:func:`repeated`), makes $k$ steps. Source: von Oswald et al. (arXiv
    2212.07677, version 2), Proposition 1. Derived in :func:`icl_lib.symbolic.gradient_descent_attention`.

    Args:
        initial: $W_0$, ``[out, in]``.
        step_size: $\eta$, positive.
        examples: $N$, the number of tokens of the context; the weights depend on it.
        curvature: $\gamma$. The layer also replaces the inputs by $(I - \gamma X X^\top)\, x_j$, the paper's GD++.
        mean: whether the layer divides by $N + 1$ itself. Then $P = \eta (N + 1)/N\; I$, and for a context of $N$
            tokens the result is the same.
        preconditioner: $A$, in the place of the $I$ in $W_Q$. The step is then $W_1 = W_0 - \eta \nabla L(W_0)\, A$.
            Layers with different matrices, applied :func:`in_turn`, make such steps one after the other. Source: Ahn
            et al. (arXiv 2306.00297), Lemma 1.

    Raises `ValueError` for values that are not finite, a step size that is not positive, or a size that is none.

    >>> layer = gradient_descent_attention(torch.zeros(1, 2), step_size=0.5, examples=1)
    >>> layer(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([2.0, 0.0, 0.0]))  # W₁ = [1.5, 0], and −W₁ x = −3
    tensor([ 2.,  0., -3.], grad_fn=<SqueezeBackward1>)
    """
    require_float("initial", initial, 2, "[out, in]")
    if initial.ndim != 2:
        raise ValueError(f"initial has shape {tuple(initial.shape)}: give one matrix [out, in].")
    require_finite("initial", initial, "give finite weights.")
    _require_number("step_size", step_size)
    _require_number("curvature", curvature)
    if step_size <= 0:
        raise ValueError(f"step_size is {step_size!r}: give a positive number.")
    require_size("examples", examples)
    out, width = initial.shape
    if preconditioner is not None:
        require_float("preconditioner", preconditioner, 2, "[in, in]")
        require_same_kind("initial", initial, preconditioner=preconditioner)
        if preconditioner.shape != (width, width):
            raise ValueError(f"preconditioner has shape {tuple(preconditioner.shape)}: give [in, in] = {width, width}.")
        require_finite("preconditioner", preconditioner, "give finite numbers.")
    layer = LinearSelfAttention(width + out, mean).to(initial)
    inputs, targets = slice(None, width), slice(width, None)
    eye = torch.eye(width + out).to(initial)
    with torch.no_grad():
        for weight in (layer.key.weight, layer.query.weight, layer.value.weight):
            weight.zero_()
        layer.key.weight[inputs, inputs] = layer.query.weight[inputs, inputs] = eye[inputs, inputs]
        if preconditioner is not None:
            layer.query.weight[inputs, inputs] = preconditioner
        layer.value.weight[targets, inputs] = initial
        layer.value.weight[targets, targets].fill_diagonal_(-1)
        if curvature:  # P multiplies by η/N, and GD++ takes −γ X Xᵀ x
            layer.value.weight[inputs, inputs].fill_diagonal_(-curvature * examples / step_size)
        layer.output.weight.copy_(eye * step_size / examples * (examples + 1 if mean else 1))
    return layer


def repeated(
    layer: LinearSelfAttention, context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"], steps: int
) -> Float[Tensor, "*batch depth n+1 dim"]:
    r"""All tokens after $0, 1, \dots, k$ applications of a layer to every token, the query last.

    Each token of the context, and the query, reads the context as the previous application left it.

    Shapes: ``context`` ``[*batch, n, dim]``, ``query`` ``[*batch, dim]``, ``steps`` $k$; the result is
    ``[*batch, k + 1, n + 1, dim]``. Raises `ValueError` for a number of steps that is not a whole number of at least 0,
    or a prompt that does not fit.

    >>> layer = gradient_descent_attention(torch.zeros(1, 1), step_size=1.0, examples=1)
    >>> after = repeated(layer, torch.tensor([[0.5, 1.0]]), torch.tensor([1.0, 0.0]), steps=2)
    >>> after[:, 1, 1].tolist()  # −W after 0, 1, 2 steps towards W = 2
    [0.0, -0.5, -0.875]
    """
    require_instance("layer", layer, LinearSelfAttention, "give what gradient_descent_attention returns.")
    require_size("steps", steps, least=0)
    require_layer_prompt(layer, context, query)
    return in_turn([layer] * steps, context, query)


def in_turn(
    layers: Sequence[LinearSelfAttention], context: Float[Tensor, "*batch n dim"], query: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch depth n+1 dim"]:
    r"""All tokens after $0, 1, \dots, L$ of the layers, the query last. Each layer is applied to every token.

    Shapes: ``context`` ``[*batch, n, dim]``, ``query`` ``[*batch, dim]``; the result is
    ``[*batch, L + 1, n + 1, dim]``. Raises `ValueError` for a layer of another kind, or a prompt that does not fit.

    >>> layers = [gradient_descent_attention(torch.zeros(1, 1), rate, examples=1) for rate in (1.0, 4.0)]
    >>> in_turn(layers, torch.tensor([[0.5, 1.0]]), torch.tensor([1.0, 0.0]))[:, 1, 1].tolist()  # −W, towards W = 2
    [0.0, -0.5, -2.0]
    """
    after = [torch.cat([context, query.unsqueeze(-2)], dim=-2)]
    for at, layer in enumerate(layers):
        require_instance(f"layers[{at}]", layer, LinearSelfAttention, "give what gradient_descent_attention returns.")
        after.append(layer.update(after[-1][..., :-1, :], after[-1]))
    return torch.stack(after, dim=-3)


def merged(layer: LinearSelfAttention) -> LinearSelfAttention:
    r"""The same function with two matrices: $W_K^\top W_Q$ in the place of $W_Q$, $P W_V$ in that of $W_V$, and $I$.

    The layer depends on these two products only, and a number may move from one to the other. It is chosen so that the
    first product has the norm $\sqrt{\operatorname{dim}}$ and a trace that is not negative. Layers can then be compared
    weight by weight.

    Raises `ValueError` for a layer whose $W_K^\top W_Q$ is zero.

    >>> layer = LinearSelfAttention(dim=3).double()
    >>> context, query = torch.randn(5, 3).double(), torch.randn(3).double()
    >>> torch.allclose(merged(layer)(context, query), layer(context, query), rtol=1e-12)
    True
    """
    require_instance("layer", layer, LinearSelfAttention, "give what gradient_descent_attention returns.")
    with torch.no_grad():
        scores = layer.key.weight.mT @ layer.query.weight
        scale = scores.norm() / math.sqrt(layer.dim)
        if not scale > 0:
            raise ValueError("layer has W_Kᵀ W_Q = 0, so it reads nothing: give a layer with other weights.")
        scale = -scale if scores.trace() < 0 else scale
        return _from_products(layer, scores / scale, layer.output.weight @ layer.value.weight * scale)


def interpolated(first: LinearSelfAttention, second: LinearSelfAttention, position: float) -> LinearSelfAttention:
    r"""The layer at a position between two :func:`merged` layers, 0 for the first and 1 for the second.

    Source: von Oswald et al. (arXiv 2212.07677, version 2), who take the mean of a trained and a constructed layer.

    Raises `ValueError` for layers of different widths or kinds, or a position that is not finite.

    >>> a, b = LinearSelfAttention(dim=3), LinearSelfAttention(dim=3)
    >>> torch.allclose(interpolated(a, b, 1.0).value.weight, merged(b).value.weight)
    True
    """
    _require_number("position", position)
    ends = merged(first), merged(second)
    if (first.dim, first.mean) != (second.dim, second.mean):
        raise ValueError(
            f"first has dim={first.dim}, mean={first.mean}, and second dim={second.dim}, mean={second.mean}: "
            "give layers of the same form."
        )
    between = [torch.lerp(*(getattr(end, name).weight for end in ends), position) for name in ("query", "value")]
    with torch.no_grad():
        return _from_products(first, *between)


def _from_products(like: LinearSelfAttention, scores: Tensor, values: Tensor) -> LinearSelfAttention:
    layer = LinearSelfAttention(like.dim, like.mean).to(scores)
    eye = torch.eye(like.dim).to(scores)
    for name, weight in {"key": eye, "query": scores, "value": values, "output": eye}.items():
        getattr(layer, name).weight.copy_(weight)
    return layer.requires_grad_(False)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}: give a finite number.")
