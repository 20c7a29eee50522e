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
    scale, length, unit = directions(a_without)
    left = ((a_with - a_without) / scale / length) @ weight.mT
    require_representable(left, "W(a_C − a₀)/‖a₀‖", "a₀")
    return LowRank(left.unsqueeze(-1), unit.unsqueeze(-1))


def directions(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A power of two, how many of it each vector is long, and the vector's direction.

    The length itself might overflow or vanish; a power of two rounds nothing.
    """
    exponent = torch.frexp(vectors.abs().amax(-1, keepdim=True).double()).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1).to(vectors.dtype)
    scaled = vectors / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scale, length, scaled / length


def require_representable(left: Tensor, formula: str, divisor: str) -> None:
    """Require a quotient that its dtype can hold."""
    require_finite(
        "the update's left factor",
        left,
        f"{formula} is too large for {left.dtype}: {divisor} is very small, or the others are very large. "
        "Use a wider dtype.",
    )


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


def _check_least_norm_edit(reads: Any, changes: Any) -> None:
    require_float("reads", reads, 2, "[*batch, m, in]")
    require_float("changes", changes, 2, "[*batch, m, out]")
    require_same_kind("reads", reads, changes=changes)
    for name, vectors in (("reads", reads), ("changes", changes)):
        require_finite(name, vectors, "look for overflow or NaN weights before it.")
    if reads.shape[:-1] != changes.shape[:-1]:
        raise ValueError(
            f"reads have shape {tuple(reads.shape)} and changes {tuple(changes.shape)}: give one change for each read."
        )
    many, width = reads.shape[-2:]
    if many > width:
        raise ValueError(f"{many} vectors of width {width} are not linearly independent: no one edit serves them all.")
    zero = (reads == 0).all(-1)
    if bool(zero.any()):
        raise ValueError(f"reads{place(zero)} is zero, so the reads are not linearly independent: no edit acts on it.")


@validated_by(_check_least_norm_edit)
def least_norm_edit(reads: Float[Tensor, "*batch m in_"], changes: Float[Tensor, "*batch m out"]) -> LowRank:
    r"""The smallest edit of a weight that changes what it answers to each of $m$ vectors as asked.

    $$D = C R^+, \qquad D\, r_k = c_k ,$$

    with the vectors as the columns of $R$ and $C$, and the Moore–Penrose inverse. Exact while the $r_k$ are linearly
    independent; its rank is at most $m$.

    Shapes: ``reads`` ``[*batch, m, in]``, ``changes`` ``[*batch, m, out]``. Raises `ValueError` where the reads are
    linearly dependent to the precision of their dtype, or of float32 where that is less.

    >>> edit = least_norm_edit(torch.eye(3)[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> edit.dense()
    tensor([[1., 3., 0.],
            [2., 4., 0.]])
    """
    # Directions alone decide on independence; the triangular factor of a few columns costs nothing in float64.
    scale, length, unit = (part.double() for part in directions(reads))
    basis, triangle = torch.linalg.qr(unit.mT)
    values = torch.linalg.svdvals(triangle)
    precision = torch.float32 if reads.dtype.itemsize < 4 else reads.dtype
    dependent = ~(values[..., -1] > reads.shape[-2] * torch.finfo(precision).eps * values[..., 0])
    if bool(dependent.any()):
        raise ValueError(
            f"reads{place(dependent)} are not linearly independent ({reads.shape[-2]} vectors, the smallest singular "
            "value of their directions is nearly zero): no one edit serves them all. Give each position its own."
        )
    left = torch.linalg.solve_triangular(triangle, (changes / scale / length).mT, upper=True, left=False)
    left = left.to(reads.dtype)
    require_representable(left, "C R⁺", "a read")
    return LowRank(left, basis.to(reads.dtype))


def _check_joint(weight: Any, a_without: Any, a_with: Any) -> None:
    _check_weight_update(weight, a_without, a_with)
    require_float("a_without", a_without, 2, "[*batch, m, in]")


@validated_by(_check_joint)
def joint_weight_update(
    weight: Float[Tensor, "out in_"], a_without: Float[Tensor, "*batch m in_"], a_with: Float[Tensor, "*batch m in_"]
) -> LowRank:
    r"""One edit that has the effect of the removed context on $m$ queries at once.

    $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad (V + \Delta V)\, z_0^k = V z_C^k .$$

    :func:`weight_update` is $m = 1$. Exact while the $z_0^k$ are linearly independent, so for at most ``in`` queries.

    Shapes: ``weight`` ``[out, in]``; ``a_without`` $Z_0$ and ``a_with`` $Z_C$ ``[*batch, m, in]``. Raises `ValueError`
    as :func:`weight_update` does, and where the $z_0^k$ are linearly dependent.

    >>> V, Z_0, Z_C = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    >>> edited = V + joint_weight_update(V, Z_0, Z_C).dense()
    >>> torch.allclose(Z_0 @ edited.mT, Z_C @ V.mT, rtol=1e-12)
    True
    """
    return least_norm_edit(a_without, (a_with - a_without) @ weight.mT)


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
