r"""One edit for more reads than it can serve exactly: least squares, and how far such an edit carries.

A map reads $r_k$, and its output should change by $\Delta h_k$. For a prompt that is replaced, $r_k = a_0^k$ is what
the map $W$ reads for query $k$ alone, and $\Delta h_k = W \delta_k$ with $\delta_k = a_C^k - a_0^k$. If the reads are
linearly independent, :func:`icl_lib.theorem.least_norm_edit` serves them all.

Source: the least-squares edit of many queries is the *thought patch* of Mazzawi et al., *Transmuting prompts into
weights* (arXiv 2510.08734); ridge, ranks and shares are this library's own.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.low_rank import LowRank
from icl_lib.theorem import require_activations, require_weight
from icl_lib.validation import require_finite, require_float, require_instance, require_same_kind


class LeastSquares:
    r"""Ridge regression from given reads, prepared once for all maps that read them.

    Args:
        reads: $r_k$, ``[m, in]``.
        ridge: $\lambda$ in :func:`least_squares_edit`.
        counts: how often each read counts, $c_k$, ``[m]``; by default once.
        guard: $g_j$, ``[n, in]``; by default none.

    The arithmetic is in float64; it takes $\min(m + n, \text{in})$ squared times the width, whatever the maps.
    """

    def __init__(
        self, reads: Tensor, ridge: float = 0.0, counts: Tensor | None = None, guard: Tensor | None = None
    ) -> None:
        self.roots = torch.ones(len(reads), 1, dtype=torch.float64, device=reads.device)
        if counts is not None:
            self.roots = counts.to(self.roots).sqrt()[:, None]
        rows, self.dtype = reads.double() * self.roots, reads.dtype
        if guard is not None:  # reads whose change is zero
            rows = torch.cat([rows, guard.double()])
        few = rows.shape[0] <= rows.shape[1]
        # The edit is (changes)ᵀ · rows · diag(1 / (values + ridge)) · basisᵀ, with the eigenvalues of the Gram matrix.
        if ridge:
            values, vectors = torch.linalg.eigh(rows @ rows.mT if few else rows.mT @ rows)
            values = values.clamp(min=0).flip(0)
            vectors = vectors.flip(1)
            self.rows, self.basis = (vectors, rows.mT @ vectors) if few else (rows @ vectors, vectors)
        else:  # the Gram matrix would lose half of the digits
            self.rows, sizes, right = torch.linalg.svd(rows, full_matrices=False)
            large = sizes > sizes[:1] * max(rows.shape) * torch.finfo(reads.dtype).eps
            sizes, right, self.rows = sizes[large], right[large], self.rows[:, large]
            values, self.basis, few = sizes.square(), right.mT * sizes, True
        self.rows = self.rows[: len(reads)]
        self.gains = 1 / (values + ridge)
        self.metric = (values if few else 1) * (values + ridge)
        self.condition = ((values[:1] + ridge) / (values[-1:] + ridge)).sqrt().sum().item()

    def edit(self, changes: Tensor, rank: int | None = None) -> LowRank:
        """Return the edit for these changes, ``[m, out]``; see :func:`least_squares_edit`."""
        left, right = (changes.double() * self.roots).mT @ self.rows * self.gains, self.basis
        if rank is not None and rank < right.shape[1]:
            metric = self.metric.sqrt()
            used = metric > metric.max() * torch.finfo(torch.float64).eps
            outputs, sizes, mixed = torch.linalg.svd(left[:, used] * metric[used], full_matrices=False)
            left = outputs[:, :rank] * sizes[:rank]
            right = (right[:, used] / metric[used]) @ mixed[:rank].mT
        elif right.shape[1] > len(changes):  # a guard adds nothing to the rank of the edit
            left, right = (changes.double() * self.roots).mT, right @ (self.rows * self.gains).mT
        return LowRank(left.to(self.dtype), right.to(self.dtype))


def least_squares_edit(
    reads: Float[Tensor, "m in_"],
    changes: Float[Tensor, "m out"],
    ridge: int | float = 0.0,
    counts: Float[Tensor, " m"] | None = None,
    rank: int | None = None,
    guard: Float[Tensor, "n in_"] | None = None,
) -> LowRank:
    r"""The edit that makes given changes for given reads as well as one matrix can, for any number of reads.

    $$\begin{aligned}
      \Delta V &= \operatorname*{arg\,min}_M \sum_k c_k \lVert M r_k - \Delta h_k \rVert^2
        + \sum_j \lVert M g_j \rVert^2 + \lambda \lVert M \rVert_F^2 \\
      &= \Delta H\, D R^\top (R D R^\top + G G^\top + \lambda I)^{-1}, \qquad D = \operatorname{diag}(c_k)
    \end{aligned}$$

    Without a ridge it is $\Delta H\, R^+$ for $c_k = 1$, the smallest of all minimisers; where the reads are linearly
    independent that is :func:`icl_lib.theorem.least_norm_edit`, and exact. With a ``rank``, it is the minimiser among
    the matrices of at most this rank (reduced-rank regression): the edit followed by the projection on the main
    directions of what it adds. The ``guard`` $g_j$ (the columns of $G$) are reads whose output should stay as it is;
    multiply them by $\sqrt\gamma$ to count them $\gamma$ times.

    Derived in :func:`icl_lib.symbolic.least_squares_edit` for $c_k = 1$.

    Shapes: ``reads`` ($r_k$, the columns of $R$) ``[m, in]``, ``changes`` ($\Delta h_k$) ``[m, out]``, ``counts``
    ``[m]``, ``guard`` ``[n, in]``. The result has rank at most $\min(m, \text{in})$. Raises `ValueError` for shapes,
    dtypes or devices that do not match, for values that are not finite, for a negative ridge or count, and for a rank
    below one.

    >>> reads, changes = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [4.0]])
    >>> least_squares_edit(reads, changes).dense().round(decimals=4)  # the mean of 2 and 4
    tensor([[3.]])
    >>> least_squares_edit(reads, changes, ridge=1.0).dense().round(decimals=4)
    tensor([[2.]])
    >>> least_squares_edit(reads, changes, guard=reads[:1]).dense().round(decimals=4)  # of 2, 4 and 0
    tensor([[2.]])
    """
    for name, vectors, layout in (("reads", reads, "[m, in]"), ("changes", changes, "[m, out]")):
        require_float(name, vectors, 2, layout)
        require_finite(name, vectors, "look for overflow or NaN weights in the layers before.")
    require_same_kind("reads", reads, changes=changes)
    if reads.ndim > 2 or changes.ndim > 2 or len(reads) != len(changes):
        raise ValueError(
            f"reads have shape {tuple(reads.shape)} and changes {tuple(changes.shape)}: give reads [m, in] and one "
            "change for each, [m, out]."
        )
    require_ridge(ridge)
    require_rank(rank)
    if counts is not None and (counts.shape != reads.shape[:1] or not bool((counts >= 0).all())):
        raise ValueError(f"counts are {counts}: give a number of at least 0 for each of the {len(reads)} reads.")
    if guard is not None:
        require_float("guard", guard, 2, "[n, in]")
        require_finite("guard", guard, "look for overflow or NaN weights in the layers before.")
        require_same_kind("reads", reads, guard=guard)
        if guard.ndim > 2 or guard.shape[-1] != reads.shape[-1]:
            raise ValueError(
                f"guard has shape {tuple(guard.shape)} and reads {tuple(reads.shape)}: give reads of the same map, "
                "[n, in]."
            )
    return LeastSquares(reads, ridge, counts, guard).edit(changes, rank)


def require_ridge(ridge: object) -> None:
    """Require a number of at least zero."""
    if isinstance(ridge, bool) or not isinstance(ridge, int | float) or not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge is {ridge!r}: give a number of at least 0.")


def require_rank(rank: object) -> None:
    """Require a whole number of at least one, or None."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank is {rank!r}: give a whole number of at least 1, or None for the full rank.")


def share_served(edit: LowRank, reads: Float[Tensor, "m in_"], changes: Float[Tensor, "m out"]) -> Float[Tensor, ""]:
    r"""The share of the wanted changes that one edit makes, $R^2$ without subtracting means.

    $$R^2 = 1 - \frac{\sum_k \lVert \Delta h_k - \Delta V\, r_k \rVert^2}{\sum_k \lVert \Delta h_k \rVert^2}$$

    1 is an edit that serves every read, 0 is as good as no edit, and a negative number is worse.

    Shapes: ``edit`` ``[out, in]``, ``reads`` ($r_k$) ``[m, in]``, ``changes`` ($\Delta h_k$) ``[m, out]``. Raises
    `ValueError` for shapes that do not match, and for changes that are all zero.

    >>> edit = LowRank(torch.eye(2), torch.eye(2))
    >>> share_served(edit, torch.eye(2), torch.eye(2)), share_served(0 * edit, torch.eye(2), torch.eye(2))
    (tensor(1.), tensor(0.))
    """
    require_instance("edit", edit, LowRank, "give a LowRank, such as least_norm_edit returns.")
    require_float("reads", reads, 2, "[m, in]")
    require_float("changes", changes, 2, "[m, out]")
    if (len(reads), reads.shape[-1]) != (len(changes), edit.shape[-1]) or changes.shape[-1] != edit.shape[-2]:
        raise ValueError(
            f"edit has shape {tuple(edit.shape)}, reads {tuple(reads.shape)} and changes {tuple(changes.shape)}: give "
            "an edit [out, in], reads [m, in] and changes [m, out]."
        )
    if not changes.any():
        raise ValueError("changes are all zero: no share of them is defined. Give reads that a context changes.")
    return 1 - (changes - edit.matvec(reads)).square().sum() / changes.square().sum()


def static_update(
    weight: Float[Tensor, "out in_"],
    a_without: Float[Tensor, "m in_"],
    a_with: Float[Tensor, "m in_"],
    ridge: int | float = 0.0,
) -> LowRank:
    r"""The best single edit of a weight for all queries of a sample.

    $$\Delta W = \operatorname*{arg\,min}_M \operatorname{E} \lVert M a_0 - W \delta \rVert^2
      = W\, \Sigma_{\delta a}\, \Sigma_{aa}^{+}, \qquad \delta = a_C - a_0, \quad
      \Sigma_{\delta a} = \operatorname{E}\, \delta a_0^\top, \quad \Sigma_{aa} = \operatorname{E}\, a_0 a_0^\top$$

    with the means over the sample in place of the expectations. What it cannot serve is the part of $\delta$ that is
    not linear in $a_0$: the residual is
    $\operatorname{tr} W (\Sigma_{\delta\delta} - \Sigma_{\delta a} \Sigma_{aa}^{+} \Sigma_{a\delta}) W^\top$. The share
    that it serves is :func:`share_served` of the identity's edit, or of this one. For one query it is
    :func:`icl_lib.theorem.weight_update`. With a ridge, $\Sigma_{aa} + \lambda I$ is inverted.

    Derived in :func:`icl_lib.symbolic.static_update`.

    Shapes: ``weight`` ``[out, in]``, ``a_without`` and ``a_with`` ``[m, in]``. Raises `ValueError` as
    :func:`least_squares_edit` and :func:`icl_lib.theorem.weight_update` do.

    >>> W, a_0 = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> S = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # where the change is linear in a₀, it serves every query
    >>> static_update(W, a_0, a_0 + a_0 @ S.mT).dense().round(decimals=4)
    tensor([[0., 1.],
            [1., 0.]])
    """
    require_weight(weight, a_without, a_with)
    require_ridge(ridge)
    return least_squares_edit(a_without, (a_with - a_without) @ weight.mT, ridge * len(a_without))


def transfer_error(
    weight: Float[Tensor, "out in_"],
    a_without: Float[Tensor, "*#batch in_"],
    a_with: Float[Tensor, "*#batch in_"],
    other_without: Float[Tensor, "*#batch in_"],
    other_with: Float[Tensor, "*#batch in_"],
) -> Float[Tensor, "... out"]:
    r"""What the edit made for one query misses at another query: the difference of the pre-activations.

    $$W a_C' - (W + \Delta W)\, a_0' = W \Bigl[ (a_C' - a_0') - (a_C - a_0)\, \frac{a_0^\top a_0'}{\lVert a_0 \rVert^2}
      \Bigr]$$

    $\Delta W$ is :func:`icl_lib.theorem.weight_update` of the first query, and the primed activations are those of the
    other. It is zero if the context changes both alike and $a_0^\top a_0' = \lVert a_0 \rVert^2$.

    Derived in :func:`icl_lib.symbolic.transfer_error`.

    Shapes: ``weight`` ``[out, in]``, the activations ``[*batch, in]``; leading dimensions broadcast. The result is
    ``[*batch, out]``. Raises `ValueError` as :func:`icl_lib.theorem.weight_update` does.

    >>> a_0, a_C = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    >>> transfer_error(torch.eye(2), a_0, a_C, a_0, a_C), transfer_error(torch.eye(2), a_0, a_C, -a_0, a_C)
    (tensor([0., 0.]), tensor([2., 2.]))
    """
    require_weight(weight, a_without, a_with)
    require_activations(other_without, other_with)
    along = (a_without * other_without).sum(-1, keepdim=True) / a_without.square().sum(-1, keepdim=True)
    return ((other_with - other_without) - (a_with - a_without) * along) @ weight.mT
