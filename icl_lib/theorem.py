r"""The theorem's formulas on tensors, one function for each statement.

A part $Y$ of the context $C$ is removed from a block $f_\theta(W A(C, x) + b)$, and an edit of the weights replaces it.
$a_0 = A(C \setminus Y, x)$ is the output of the contextual layer without that part (``a_without``), $a_C = A(C, x)$ its
output with it (``a_with``).

Source: Dherin, Munn, Mazzawi, Wunder, Gonzalvo, *Learning without training* (arXiv 2507.16003).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.low_rank import LowRank
from icl_lib.measures import wide
from icl_lib.validation import (
    require_broadcastable,
    require_finite,
    require_float,
    require_nowhere,
    require_same_kind,
)


def weight_update(
    weight: Float[Tensor, "out in_"],
    a_without: Float[Tensor, "*#batch in_"],
    a_with: Float[Tensor, "*#batch in_"],
) -> LowRank:
    r"""The smallest edit of a weight that reproduces the pre-activation with the removed context.

    $$\Delta W = \frac{W (a_C - a_0)\, a_0^\top}{\lVert a_0 \rVert^2}, \qquad (W + \Delta W)\, a_0 = W a_C .$$

    It has rank at most one. It is the only edit of least Frobenius norm with $(W + \Delta W)\, a_0 = W a_C$, so the
    only smallest one that gives the same block output for every $f_\theta$. For one given $f_\theta$ there can be
    smaller edits with the same output: :func:`icl_lib.paper.experiments.smaller_edits`. Source: Dherin et al.
    (arXiv 2507.16003), Theorem 2.2 in version 1, Theorem 2.3 in version 4. Derived in
    :func:`icl_lib.symbolic.weight_update`.

    Shapes: ``weight`` is ``[out, in]``; ``a_without`` and ``a_with`` are ``[*batch, in]``, and their leading dimensions
    broadcast. The result is one rank-one :class:`~icl_lib.low_rank.LowRank` ``[*batch, out, in]``. Its right factor is
    the unit vector $a_0 / \lVert a_0 \rVert$, so the norm of the left factor is the norm of the update.

    Raises `ValueError` for a zero $a_0$, for NaN or infinite values, for shapes, dtypes or devices that do not match,
    and for an update that overflows its dtype. There is no epsilon in the denominator. In floating point the relative
    error is about $\lVert W \rVert \lVert a_0 \rVert / \lVert W a_C \rVert$ machine epsilons: digits are lost where
    $a_0$ is much longer than $a_C$.

    >>> W = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    >>> update = weight_update(W, a_without=torch.tensor([1.0, 0.0]), a_with=torch.tensor([1.0, 1.0]))
    >>> update.dense()
    tensor([[0., 0.],
            [3., 0.]])
    >>> (W + update.dense()) @ torch.tensor([1.0, 0.0])  # = W @ [1, 1]
    tensor([2., 3.])
    """
    require_weight(weight, a_without, a_with)
    scale, length, unit = directions(a_without)
    left = ((a_with - a_without) / scale / length) @ weight.mT
    require_representable(left, "W(a_C − a₀)/‖a₀‖", "a₀")
    return LowRank(left.unsqueeze(-1), unit.unsqueeze(-1))


def require_weight(weight: Tensor, a_without: Tensor, a_with: Tensor) -> None:
    """Require a finite matrix, and activations that it reads; those without the context must not be zero."""
    require_float("weight", weight, 2, "[out, in]")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: give one matrix [out, in].")
    require_activations(a_without, a_with)
    require_same_kind("weight", weight, a_without=a_without)
    if weight.shape[1] != a_without.shape[-1]:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} and a_without {tuple(a_without.shape)}: the last dimension of "
            "a_without must equal weight's second. Is the weight transposed?"
        )
    require_finite("weight", weight, "the theorem needs finite weights. Did the training diverge?")
    require_nowhere(
        "a_without",
        (a_without == 0).all(-1),
        "is zero: the update divides by its squared norm, and no edit of the weight changes the output for a zero "
        "input. Keep a token of the context, or use a contextual layer that is not zero without it.",
    )


def require_activations(a_without: Tensor, a_with: Tensor) -> None:
    """Require finite activations of one width, dtype and device."""
    for name, activation in (("a_without", a_without), ("a_with", a_with)):
        require_float(name, activation, 1, "[*batch, in]")
        require_finite(name, activation, "look for overflow or NaN weights in the contextual layer.")
    require_same_kind("a_without", a_without, a_with=a_with)
    if a_with.shape[-1] != a_without.shape[-1]:
        raise ValueError(
            f"a_with has {a_with.shape[-1]} features and a_without has {a_without.shape[-1]}: "
            "take both from the same contextual layer."
        )
    require_broadcastable(a_without=a_without.shape[:-1], a_with=a_with.shape[:-1])


def directions(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A power of two, the length of each vector in units of it, and the vector's direction.

    The length itself could overflow or underflow. Division by a power of two is exact.
    """
    exponent = torch.frexp(vectors.abs().amax(-1, keepdim=True).double()).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent - 1).to(vectors.dtype)
    scaled = vectors / scale
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scale, length, scaled / length


def require_representable(left: Tensor, formula: str, divisor: str) -> None:
    """Raise a `ValueError` where the left factor overflows its dtype."""
    require_finite(
        "the update's left factor",
        left,
        f"{formula} is too large for {left.dtype}, since {divisor} is very small or the other values are very large. "
        "Use a wider dtype.",
    )


def bias_update(
    a_without: Float[Tensor, "*#batch dim"], a_with: Float[Tensor, "*#batch dim"]
) -> Float[Tensor, "... dim"]:
    r"""The edit of the output bias that a block with skip connections needs beside $\Delta W$.

    In $T(C, x) = x + A(C, x) + W' \sigma(W A(C, x) + b) + b'$ the removed context also reaches the output along the
    skip connection. The output bias adds the difference:

    $$\Delta b' = a_C - a_0 .$$

    Source: Dherin et al. (arXiv 2507.16003), version 1, the appendix on skip connections; Theorem C.2 in version 4.
    Derived in :func:`icl_lib.symbolic.bias_update`.

    Shapes: both are ``[*batch, dim]``, and their leading dimensions broadcast. Raises `ValueError` for NaN or infinite
    activations and for shapes, dtypes or devices that do not match.

    >>> bias_update(torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([0., 1.])
    """
    require_activations(a_without, a_with)
    return a_with - a_without


class NoSingleEditError(ValueError):
    """No single edit serves all vectors: what a map reads is linearly dependent, or a norm has no common scale."""


def least_norm_edit(reads: Float[Tensor, "*batch m in_"], changes: Float[Tensor, "*batch m out"]) -> LowRank:
    r"""The smallest edit of a weight that changes its output for each of $m$ reads by a given vector.

    $$\Delta V = \Delta H\, R^+, \qquad \Delta V\, r_k = \Delta h_k .$$

    The reads $r_k$ and the changes $\Delta h_k$ are the columns of $R$ and $\Delta H$, and $R^+$ is the Moore–Penrose
    inverse. The edit is exact if the $r_k$ are linearly independent. Its rank is at most $m$.

    Shapes: ``reads`` is ``[*batch, m, in]``, ``changes`` is ``[*batch, m, out]``. Raises :class:`NoSingleEditError`,
    a `ValueError`, for reads that are linearly dependent to the precision of their dtype (of float32 for half
    precision).

    >>> edit = least_norm_edit(torch.eye(3)[:2], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> edit.dense()
    tensor([[1., 3., 0.],
            [2., 4., 0.]])
    """
    for name, vectors, layout in (("reads", reads, "[*batch, m, in]"), ("changes", changes, "[*batch, m, out]")):
        require_float(name, vectors, 2, layout)
        require_finite(name, vectors, "look for overflow or NaN weights in the layers before.")
    require_same_kind("reads", reads, changes=changes)
    if reads.shape[:-1] != changes.shape[:-1]:
        raise ValueError(
            f"reads have shape {tuple(reads.shape)} and changes {tuple(changes.shape)}: give one change for each read."
        )
    many, width = reads.shape[-2:]
    if many > width:
        raise NoSingleEditError(
            f"reads: {many} vectors of width {width} are not linearly independent, so no single edit serves them all. "
            "Give each its own edit."
        )
    require_nowhere(
        "reads",
        (reads == 0).all(-1),
        "is zero, so the reads are not linearly independent: no edit changes the output for a zero input. Remove it.",
        NoSingleEditError,
    )
    # Independence is a matter of the directions. Their QR factors are small, so float64 costs little.
    scale, length, unit = (part.double() for part in directions(reads))
    basis, triangle = torch.linalg.qr(unit.mT)
    values = torch.linalg.svdvals(triangle)
    require_nowhere(
        "reads",
        ~(values[..., -1] > many * torch.finfo(wide(reads)).eps * values[..., 0]),
        f"are not linearly independent ({many} vectors; the smallest singular value of their directions is nearly "
        "zero), so no single edit serves them all. Give each its own edit.",
        NoSingleEditError,
    )
    left = torch.linalg.solve_triangular(triangle, (changes / scale / length).mT, upper=True, left=False)
    left = left.to(reads.dtype)
    require_representable(left, "ΔH R⁺", "a read")
    return LowRank(left, basis.to(reads.dtype))


def joint_weight_update(
    weight: Float[Tensor, "out in_"], a_without: Float[Tensor, "*batch m in_"], a_with: Float[Tensor, "*batch m in_"]
) -> LowRank:
    r"""The smallest edit that reproduces the pre-activations of $m$ queries at once.

    $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad (V + \Delta V)\, z_0^k = V z_C^k .$$

    For $m = 1$ it is :func:`weight_update`. It is exact if the $z_0^k$ are linearly independent, so for at most ``in``
    queries.

    Shapes: ``weight`` is ``[out, in]``; ``a_without`` ($Z_0$) and ``a_with`` ($Z_C$) are ``[*batch, m, in]``. Raises
    `ValueError` as :func:`weight_update` does, and for linearly dependent $z_0^k$.

    >>> V, Z_0, Z_C = torch.randn(5, 4).double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()
    >>> edited = V + joint_weight_update(V, Z_0, Z_C).dense()
    >>> torch.allclose(Z_0 @ edited.mT, Z_C @ V.mT, rtol=1e-12)
    True
    """
    require_weight(weight, a_without, a_with)
    require_float("a_without", a_without, 2, "[*batch, m, in]")
    return least_norm_edit(a_without, (a_with - a_without) @ weight.mT)


def alignment(first: LowRank, second: LowRank) -> Tensor:
    r"""The cosine of the angle between two updates, taken as vectors of their entries.

    $$\cos(\Delta W, \Delta W') = \frac{\operatorname{tr}(\Delta W^\top \Delta W')}
      {\lVert \Delta W\rVert_F \lVert \Delta W'\rVert_F}$$

    Source: Innocenti and Achour (arXiv 2512.11255), Figures A.1 and A.2. For two positions of one block it is the
    cosine of $W(g_i - f)$ and $W(g_j - f)$. For two blocks it is that times the cosine of their $f$, and it changes
    with the numbering of the hidden units. Derived in :func:`icl_lib.symbolic.alignment` and
    :func:`icl_lib.symbolic.hidden_permutation`.

    Shapes: both are ``[*batch, out, in]``, and their leading dimensions broadcast:
    ``alignment(u[..., :, None], u[..., None, :])`` is the table of all pairs. The result is NaN for a zero update,
    which has no direction. Raises `ValueError` for updates of different sizes.

    >>> e = torch.eye(3)
    >>> updates = LowRank(e[:, :, None], torch.ones(3, 1, 1))  # three updates, pairwise orthogonal
    >>> alignment(updates[:, None], updates[None, :])
    tensor([[1., 0., 0.],
            [0., 1., 0.],
            [0., 0., 1.]])
    """
    return first.inner(second) / (first.norm() * second.norm())
