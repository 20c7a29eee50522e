r"""The theorem's formulas on tensors, one function a statement.

Each removes a part $Y$ of a context $C$ from a block $f_\theta(W A(C, x) + b)$ and gives the edit that makes up for it.
$a_0 = A(C \setminus Y, x)$ is what the contextual layer yields without that part (``a_without``), $a_C = A(C, x)$ what
it yields with it (``a_with``).

Source: Dherin, Munn, Mazzawi, Wunder, Gonzalvo, *Learning without training* (arXiv 2507.16003).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.low_rank import LowRank
from icl_lib.validation import (
    place,
    require_broadcastable,
    require_finite,
    require_float,
    require_same_kind,
    validated_by,
)


def _check_activations(a_without: Any, a_with: Any) -> None:
    require_float("a_without", a_without, 1, "[*batch, in]")
    require_float("a_with", a_with, 1, "[*batch, in]")
    require_same_kind("a_without", a_without, a_with=a_with)
    if a_with.shape[-1] != a_without.shape[-1]:
        raise ValueError(
            f"a_with has {a_with.shape[-1]} features and a_without has {a_without.shape[-1]}: "
            "both must come from the same contextual layer."
        )
    require_broadcastable(a_without=a_without.shape[:-1], a_with=a_with.shape[:-1])
    for name, activation in (("a_without", a_without), ("a_with", a_with)):
        require_finite(name, activation, "look for overflow or NaN weights in the contextual layer.")


def _check_weight_update(weight: Any, a_without: Any, a_with: Any) -> None:
    require_float("weight", weight, 2, "[out, in]")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give one matrix [out, in].")
    _check_activations(a_without, a_with)
    require_same_kind("weight", weight, a_without=a_without)
    if weight.shape[1] != a_without.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and a_without {tuple(a_without.shape)}: the last dimension of "
            "a_without must be weight's second. Is the weight transposed?"
        )
    require_finite("weight", weight, "the theorem needs finite weights; was the model trained to divergence?")
    zero = (a_without == 0).all(-1)
    if bool(zero.any()):
        raise ValueError(
            f"a_without{place(zero)} is zero: the update divides by its squared norm, and no edit of the weights can "
            "act on a zero input. Keep a token of the context, or let the layer before return something without it."
        )


@validated_by(_check_weight_update)
def weight_update(
    weight: Float[Tensor, "out in_"],
    a_without: Float[Tensor, "*#batch in_"],
    a_with: Float[Tensor, "*#batch in_"],
) -> LowRank:
    r"""The smallest edit of a weight that has the effect of the removed context.

    $$\Delta W = \frac{W (a_C - a_0)\, a_0^\top}{\lVert a_0 \rVert^2}, \qquad (W + \Delta W)\, a_0 = W a_C .$$

    Source: Dherin et al., Theorem 2.2. It has rank at most one, and it is the unique solution of least Frobenius norm
    (v4, Theorem 2.3); :func:`icl_lib.symbolic.weight_update` derives both.

    Shapes: ``weight`` ``[out, in]``; ``a_without``, ``a_with`` ``[*batch, in]``, leading dimensions broadcast. The
    result is one rank-one :class:`~icl_lib.low_rank.LowRank` ``[*batch, out, in]``. The right factor is the unit vector
    $a_0 / \lVert a_0 \rVert$, so the left factor carries the whole norm.

    Raises `ValueError` for a zero, NaN or infinite activation, for shapes, dtypes or devices that do not fit, and where
    the update is too large for the dtype. There is no epsilon: the identity is exact. In floating point the relative
    error is about $\lVert W \rVert \lVert a_0 \rVert / \lVert W a_C \rVert$ machine epsilons, so that digits are lost
    where $a_0$ is much longer than $a_C$.

    >>> W = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    >>> update = weight_update(W, a_without=torch.tensor([1.0, 0.0]), a_with=torch.tensor([1.0, 1.0]))
    >>> update.dense()
    tensor([[0., 0.],
            [3., 0.]])
    >>> (W + update.dense()) @ torch.tensor([1.0, 0.0])  # = W @ [1, 1]
    tensor([2., 3.])
    """
    # Dividing by a power of two rounds nothing, and keeps ‖a₀‖² from underflowing or overflowing.
    exponent = torch.frexp(a_without.abs().amax(-1, keepdim=True).double()).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1).to(a_without.dtype)
    scaled = a_without / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    left = ((a_with - a_without) / scale / length) @ weight.mT
    require_finite(
        "the update's left factor",
        left,
        f"W(a_C − a₀)/‖a₀‖ is too large for {weight.dtype}: a₀ is very small, or the others are very large. "
        "Use a wider dtype.",
    )
    return LowRank(left.unsqueeze(-1), (scaled / length).unsqueeze(-1))


@validated_by(_check_activations)
def bias_update(
    a_without: Float[Tensor, "*#batch dim"], a_with: Float[Tensor, "*#batch dim"]
) -> Float[Tensor, "... dim"]:
    r"""The edit of the output bias that carries the skip connection's share.

    In $T(C, x) = x + A(C, x) + W' g(W A(C, x) + b) + b'$ the removed context also reaches the output directly, and

    $$\Delta b' = a_C - a_0$$

    makes up for it beside the same $\Delta W$. Source: Dherin et al., Appendix A (Theorem B.2);
    :func:`icl_lib.symbolic.bias_update` derives it.

    Shapes: both ``[*batch, dim]``, leading dimensions broadcast. Raises `ValueError` for NaN or infinite activations
    and for shapes, dtypes or devices that do not fit.

    >>> bias_update(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([0., 1.])
    """
    return a_with - a_without


def alignment(first: LowRank, second: LowRank) -> Tensor:
    r"""The cosine of the angle between two updates, as vectors of all their entries.

    $$\cos(\Delta W, \Delta W') = \frac{\operatorname{tr}(\Delta W^\top \Delta W')}
      {\lVert \Delta W\rVert_F \lVert \Delta W'\rVert_F}$$

    Source: Innocenti and Achour (arXiv 2512.11255), Figures A.1 and A.2. For two positions of one block it is the
    cosine of $W(g_i - f)$ and $W(g_j - f)$ (:func:`icl_lib.symbolic.alignment_within`); for two blocks, it is
    that times the cosine of their $f$ (:func:`icl_lib.symbolic.alignment_across`), and it changes with the numbering of
    the hidden units (:func:`icl_lib.symbolic.hidden_permutation`).

    Shapes: both ``[*batch, out, in]``; leading dimensions broadcast, so ``alignment(u[..., :, None], u[..., None, :])``
    is the table of all pairs. NaN where an update is zero, which has no direction. Raises `ValueError` for updates of
    different sizes.

    >>> e = torch.eye(3)
    >>> updates = LowRank(e[:, :, None], torch.ones(3, 1, 1))  # three updates, pairwise orthogonal
    >>> alignment(updates[:, None], updates[None, :])
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    return first.inner(second) / (first.norm() * second.norm())
