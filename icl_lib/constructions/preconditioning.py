r"""The best layer, or layers, of linear attention for regression prompts with Gaussian inputs.

The inputs are $x \sim N(0, \Sigma)$ and the tasks $w \sim N(0, \Omega)$. A layer of linear attention with the matrix
$A$ predicts

$$\hat y = \beta^\top A\, x, \qquad \beta = \frac1N \sum_{i=1}^N y_i x_i ,$$

which is one step of gradient descent from zero, with the preconditioner $A$. Source: Ahn et al., *Transformers learn to
implement preconditioned gradient descent for in-context learning* (arXiv 2306.00297).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.validation import require_finite, require_float, require_same_kind, require_size


def one_layer_optimum(
    covariance: Float[Tensor, "d d"], examples: int, tasks: Float[Tensor, "d d"] | None = None
) -> Float[Tensor, "d d"]:
    r"""The matrix with which one layer of linear attention has the least expected squared error.

    $$A = \Bigl(\tfrac{N+1}{N}\, \Sigma + \tfrac{\operatorname{tr} \Sigma}{N}\, I\Bigr)^{-1}$$

    for tasks $w \sim N(0, I)$. If they are $N(0, \Omega)$, it is $A = S^{-1} \Sigma\, \Omega$ with
    $S = \tfrac{N+1}{N}\, \Sigma\, \Omega\, \Sigma + \tfrac1N \operatorname{tr}(\Omega \Sigma)\, \Sigma$. Source: Ahn et
    al. (arXiv 2306.00297), Theorem 1, who write it with the eigenvectors of $\Sigma$. Derived in
    :func:`icl_lib.symbolic.one_layer_optimum`.

    Args:
        covariance: $\Sigma$, of the inputs, ``[d, d]``.
        examples: $N$, the number of examples in a prompt.
        tasks: $\Omega$, ``[d, d]``; default the identity.

    Raises `ValueError` for a covariance that is not symmetric and positive definite.

    >>> one_layer_optimum(torch.eye(3), examples=4)[0]  # N / (N + d + 1)
    tensor([0.5000, 0.0000, 0.0000])
    """
    tasks = _required(covariance, examples, tasks)
    return torch.linalg.solve(_second_moment(covariance, examples, tasks), covariance @ tasks)


def one_layer_loss(
    preconditioner: Float[Tensor, "*batch d d"],
    covariance: Float[Tensor, "d d"],
    examples: int,
    tasks: Float[Tensor, "d d"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""The expected squared error of one layer of linear attention, for any matrix $A$.

    $$L(A) = \operatorname{tr}(\Omega \Sigma) - 2 \operatorname{tr}(\Omega\, \Sigma A\, \Sigma)
      + \operatorname{tr}(A\, \Sigma A^\top S)$$

    with $S = \mathbb{E}\, \hat\Sigma\, \Omega\, \hat\Sigma$ as in :func:`one_layer_optimum`, where
    $\hat\Sigma = \frac1N \sum_i x_i x_i^\top$. The moments of Gaussian inputs are exact. PyTorch can differentiate it.

    Shapes: ``preconditioner`` ``[*batch, d, d]``, the others ``[d, d]``; the result is ``[*batch]``. Raises
    `ValueError` as :func:`one_layer_optimum` does.

    >>> one_layer_loss(torch.zeros(3, 3), torch.eye(3), examples=4)  # it predicts zero
    tensor(3.)
    """
    tasks = _required(covariance, examples, tasks)
    require_float("preconditioner", preconditioner, 2, "[*batch, d, d]")
    require_same_kind("covariance", covariance, preconditioner=preconditioner)
    if preconditioner.shape[-2:] != covariance.shape:
        raise ValueError(
            f"preconditioner has shape {tuple(preconditioner.shape)} and covariance {tuple(covariance.shape)}: give "
            "matrices of one size."
        )
    fitted = tasks @ covariance @ preconditioner @ covariance
    squared = preconditioner @ covariance @ preconditioner.mT @ _second_moment(covariance, examples, tasks)
    return (tasks * covariance).sum() + (squared - 2 * fitted).diagonal(dim1=-2, dim2=-1).sum(-1)


@cache
def _wishart_moment(features: int, examples: int, powers: tuple[int, ...]) -> int:
    r"""The exact mean of $\prod_k \operatorname{tr} W^{k}$ for $W = \sum_i x_i x_i^\top$, $x_i \sim N(0, I)$.

    Integration by parts in one of the $x$ (Stein's identity) lowers the first power by one.
    """
    if not powers:
        return 1
    first, rest = powers[0], powers[1:]
    if first == 0:
        return features * _wishart_moment(features, examples, rest)

    def mean(*more: int, left: tuple[int, ...] = rest) -> int:
        return _wishart_moment(features, examples, tuple(sorted((*more, *left), reverse=True)))

    total = (examples + first - 1) * mean(first - 1) + sum(mean(j, first - 1 - j) for j in range(first - 1))
    for at, power in enumerate(rest):
        total += 2 * power * mean(first - 1 + power, left=rest[:at] + rest[at + 1 :])
    return total


def best_rates(layers: int, features: int, examples: int) -> tuple[Float[Tensor, " layers"], float]:
    r"""The rates $a_l$ of the best $L$ layers of the form $A_l = a_l \Sigma^{-1}$, and their expected squared error.

    The tasks are $N(0, \Sigma^{-1})$. Then the error of the layers is $\mathbb{E} \operatorname{tr} p(\hat\Sigma)^2$
    with $p(s) = \prod_l (1 - a_l s)$ and the $\hat\Sigma$ of white inputs. Among all polynomials with $p(0) = 1$ the
    best one solves a linear system in the moments $\mathbb{E} \operatorname{tr} \hat\Sigma^k$, which are exact here.
    Its roots are real and positive, because it is orthogonal to the others with the weight $s$. The order of the layers
    does not matter. Source: this book; that such layers are critical points: Ahn et al. (arXiv 2306.00297).

    Shapes: the rates are ``[layers]`` in float64, in increasing order. Raises `ValueError` for a size that is not a
    positive whole number.

    >>> rates, loss = best_rates(layers=1, features=3, examples=4)
    >>> rates, round(loss, 12)  # N / (N + d + 1)
    (tensor([0.5000], dtype=torch.float64), 1.5)
    """
    require_size("layers", layers)
    moments = _moments(layers, features, examples)
    coefficients = -np.linalg.solve(moments[1:, 1:], moments[1:, 0])
    roots = np.roots([*coefficients[::-1], 1.0])
    return torch.as_tensor(np.sort(1 / roots.real)), float(moments[0, 0] + coefficients @ moments[1:, 0])


def rates_loss(rates: Sequence[float], features: int, examples: int) -> float:
    r"""The expected squared error of layers $A_l = a_l \Sigma^{-1}$ with any rates; see :func:`best_rates`.

    Raises `ValueError` for a size that is not a positive whole number.

    >>> rates_loss([0.5], features=3, examples=4), rates_loss([], features=3, examples=4)
    (1.5, 3.0)
    """
    coefficients = np.array([1.0])  # of p, the constant first
    for rate in rates:
        coefficients = np.append(coefficients, 0.0) - rate * np.append(0.0, coefficients)
    return float(coefficients @ _moments(len(rates), features, examples) @ coefficients)


def _moments(degree: int, features: int, examples: int) -> np.ndarray:
    r"""The matrix of $\mathbb{E} \operatorname{tr} \hat\Sigma^{i + j}$ for white inputs, $i, j = 0, \dots,$ degree."""
    for name, size in (("features", features), ("examples", examples)):
        require_size(name, size)
    moments = [_wishart_moment(features, examples, (k,)) / examples**k for k in range(2 * degree + 1)]
    return np.array([moments[i : i + degree + 1] for i in range(degree + 1)])


def descent_error(
    preconditioners: Sequence[Float[Tensor, "d d"]], sample: Float[Tensor, "*batch d d"]
) -> Float[Tensor, "*batch d d"]:
    r"""The matrix $\prod_l (I - \hat\Sigma A_l)$, which takes a task to what is left of it after the layers.

    The prediction of the layers is wrong by $w^\top \prod_l (I - \hat\Sigma A_l)\, x$. Source: Ahn et al. (arXiv
    2306.00297), Lemma 1.

    Shapes: ``preconditioners`` $L$ matrices ``[d, d]``, ``sample`` $\hat\Sigma$ ``[*batch, d, d]``.

    >>> descent_error([torch.eye(2), torch.eye(2)], 0.5 * torch.eye(2))
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """
    require_float("sample", sample, 2, "[*batch, d, d]")
    left = torch.eye(sample.shape[-1]).to(sample).expand_as(sample)
    for A in preconditioners:
        left = left - left @ sample @ A
    return left


def _second_moment(covariance: Tensor, examples: int, tasks: Tensor) -> Tensor:
    r"""The mean of $\hat\Sigma\, \Omega\, \hat\Sigma$, by the theorem of Isserlis."""
    product = covariance @ tasks @ covariance
    return (1 + 1 / examples) * product + (tasks * covariance).sum() / examples * covariance


def _required(covariance: Tensor, examples: int, tasks: Tensor | None) -> Tensor:
    """Check the arguments, and return the covariance of the tasks."""
    require_covariance("covariance", covariance)
    require_size("examples", examples)
    if tasks is None:
        return torch.eye(len(covariance)).to(covariance)
    require_covariance("tasks", tasks)
    require_same_kind("covariance", covariance, tasks=tasks)
    if tasks.shape != covariance.shape:
        raise ValueError(
            f"tasks has shape {tuple(tasks.shape)} and covariance {tuple(covariance.shape)}: give matrices of one size."
        )
    return tasks


def require_covariance(name: str, matrix: Tensor) -> None:
    """Require a symmetric and positive definite matrix."""
    require_float(name, matrix, 2, "[d, d]")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{name} has shape {tuple(matrix.shape)}: give a square matrix [d, d].")
    require_finite(name, matrix, "give finite numbers.")
    if not torch.allclose(matrix, matrix.mT) or torch.linalg.cholesky_ex(matrix).info:
        raise ValueError(f"{name} is not symmetric and positive definite: give the covariance of a density.")
