"""A matrix of low rank, kept as its two factors."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icl_lib.measures import wide
from icl_lib.validation import require_broadcastable, require_float, require_same_kind


class LowRank:
    r"""The matrix $L R^\top$, stored as its factors and batched over leading dimensions; ``.dense()`` forms it.

    An update of a 4096 × 16384 weight has 67 million entries; its two rank-one factors have 20 thousand.

    Shapes: ``left`` is ``[*batch, out, rank]``, ``right`` is ``[*batch, in, rank]``. The leading dimensions broadcast,
    to ``.batch_shape``, so updates that share a factor store it once. A ``LowRank`` behaves like the tensor
    ``.dense()`` of shape ``[*batch, out, in]`` under ``@``, ``+``, ``-``, ``*`` and indexing of its leading dimensions.

    Raises `ValueError` for factors that are not floating-point tensors, that differ in rank, dtype or device, or whose
    leading dimensions do not broadcast.

    >>> update = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [0.0]]))
    >>> update.shape, int(update.rank()), round(float(update.norm()), 4)
    (torch.Size([2, 3]), 1, 11.1803)
    >>> update.dense()
    tensor([[3., 4., 0.],
            [6., 8., 0.]])
    >>> update @ torch.tensor([1.0, 1.0, 1.0])
    tensor([ 7., 14.])
    """

    __array_ufunc__ = None  # NumPy then leaves `array @ low_rank` to this class, which refuses it

    def __init__(self, left: Float[Tensor, "*#batch out rank"], right: Float[Tensor, "*#batch in_ rank"]) -> None:
        require_float("left", left, 2, "[*batch, out, rank]")
        require_float("right", right, 2, "[*batch, in, rank]")
        require_same_kind("left", left, right=right)
        if left.shape[-1] != right.shape[-1]:
            raise ValueError(
                f"left has {left.shape[-1]} columns and right has {right.shape[-1]}: "
                "give both one column for each rank-one term."
            )
        self.batch_shape = require_broadcastable(left=left.shape[:-2], right=right.shape[:-2])
        self.left, self.right = left, right

    @property
    def shape(self) -> torch.Size:
        """The shape of the matrix, ``[*batch, out, in]``."""
        return torch.Size((*self.batch_shape, self.left.shape[-2], self.right.shape[-2]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.left.device

    @property
    def mT(self) -> LowRank:
        """The transpose, which has the two factors swapped."""
        return LowRank(self.right, self.left)

    def dense(self) -> Float[Tensor, "*batch out in_"]:
        """The matrix itself, ``left @ right.mT``."""
        return self.left @ self.right.mT

    def matvec(self, vectors: Float[Tensor, "*vectors in_"]) -> Float[Tensor, "... out"]:
        """The product with one vector for each batch entry, ``L (Rᵀ v)``, in ``O((out + in) rank)`` operations.

        >>> factors = torch.ones(5, 3, 1)
        >>> LowRank(factors, factors).matvec(torch.ones(5, 3))[0]
        tensor([3., 3., 3.])
        """
        read = self.right.mT @ vectors.unsqueeze(-1)
        if self.left.shape[-1] == 1:  # the general product of matrices is many times slower here
            return self.left.squeeze(-1) * read.squeeze(-1)
        return (self.left @ read).squeeze(-1)

    def addmv(self, base: Float[Tensor, "*base out"], vectors: Float[Tensor, "*vectors in_"]) -> Tensor:
        """``base + self.matvec(vectors)``: the output of a linear map after this update, if it was ``base`` before.

        >>> factors = torch.ones(5, 3, 1)
        >>> LowRank(factors, factors).addmv(torch.ones(3), torch.ones(5, 3))[0]
        tensor([4., 4., 4.])
        """
        if self.left.shape[-1] == 1:
            return torch.addcmul(base, self.left.squeeze(-1), (self.right.mT @ vectors.unsqueeze(-1)).squeeze(-1))
        return base + self.matvec(vectors)

    def norm(self) -> Float[Tensor, "*batch"]:
        r"""The Frobenius norm $\lVert L R^\top \rVert_F$; for rank one, $\lVert l \rVert \lVert r \rVert$."""
        if self.left.shape[-1] == 1:
            norms = (torch.linalg.vector_norm(factor, dim=(-2, -1)) for factor in (self.left, self.right))
            return next(norms) * next(norms)
        return torch.linalg.vector_norm(self._core(), dim=(-2, -1)).to(self.dtype)

    def inner(self, other: LowRank) -> Float[Tensor, "*batch"]:
        r"""The Frobenius inner product $\operatorname{tr}(A^\top B)$ with another low-rank matrix of the same shape.

        >>> a = LowRank(torch.eye(3), torch.eye(3))
        >>> float(a.inner(a))
        3.0
        """
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(
                f"other is {tuple(other.shape)} and this matrix {tuple(self.shape)}: sizes must agree in out and in."
            )
        return ((self.left.mT @ other.left) * (self.right.mT @ other.right)).sum(dim=(-2, -1))

    def sum(self, dim: int) -> LowRank:
        """The sum over a leading dimension, with the columns of all terms side by side; ``dim`` as in the dense tensor.

        >>> terms = LowRank(torch.ones(5, 3, 1), torch.ones(1, 4, 1))
        >>> total = terms.sum(dim=0)
        >>> total.shape, int(total.rank()), float(total.dense()[0, 0])
        (torch.Size([3, 4]), 1, 5.0)
        """
        leading = len(self.batch_shape)
        place = dim + leading + 2 if dim < 0 else dim
        if not 0 <= place < leading:
            raise ValueError(f"dim is {dim}: give one of the {leading} leading dimensions of {tuple(self.shape)}.")
        factors = _expanded(self.batch_shape, self.left, self.right)
        return LowRank(*(factor.movedim(place, -1).flatten(-2) for factor in factors))

    def first(self, terms: int) -> LowRank:
        """The sum of the first ``terms`` rank-one terms: a matrix built step by step, after that many steps.

        >>> grown = LowRank(torch.eye(3), torch.eye(3))
        >>> grown.first(2).dense().diagonal()
        tensor([1., 1., 0.])
        """
        have = self.left.shape[-1]
        if isinstance(terms, bool) or not isinstance(terms, int) or not 0 <= terms <= have:
            raise ValueError(f"terms is {terms!r}: give a whole number from 0 to {have}.")
        return LowRank(self.left[..., :terms], self.right[..., :terms])

    def singular_values(self) -> Float[Tensor, "*batch values"]:
        """The singular values, largest first; those that are zero because of the low rank are left out."""
        return torch.linalg.svdvals(self._core()).to(self.dtype)

    def rank(self) -> Int[Tensor, "*batch"]:
        """The numerical rank: singular values above ``max(out, in) · machine epsilon · largest``."""
        values = torch.linalg.svdvals(self._core(scaled=True))
        tolerance = max(self.shape[-2:]) * torch.finfo(self.dtype).eps * values[..., :1]
        return (values > tolerance).sum(-1)

    def to(self, *args: Any, **kwargs: Any) -> LowRank:
        """Move both factors to another device or dtype; the arguments are those of `torch.Tensor.to`."""
        return LowRank(self.left.to(*args, **kwargs), self.right.to(*args, **kwargs))

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, LowRank):
            return LowRank(self.left @ (self.right.mT @ other.left), other.right)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim == 1:
            return self.matvec(other)
        return self.left @ (self.right.mT @ other)

    def __rmatmul__(self, other: Any) -> Any:
        if not isinstance(other, Tensor):
            return NotImplemented
        return self.mT.matvec(other) if other.ndim == 1 else (other @ self.left) @ self.right.mT

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Tensor):
            return self.dense() + other
        if isinstance(other, int) and other == 0:  # Python's sum() starts with 0
            return self
        if not isinstance(other, LowRank):
            return NotImplemented
        require_same_kind("the first LowRank", self, other=other)
        if self.shape[-2:] != other.shape[-2:]:
            raise ValueError(f"other is {tuple(other.shape)}, this matrix {tuple(self.shape)}: out and in must agree.")
        return LowRank(_beside(self.left, other.left), _beside(self.right, other.right))

    __radd__ = __add__

    def __neg__(self) -> LowRank:
        return LowRank(-self.left, self.right)

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def __mul__(self, scale: float | int | Tensor) -> LowRank:
        """Multiply by a number, or by one number for each batch entry, ``[*batch, 1, 1]``."""
        if isinstance(scale, Tensor) and scale.ndim and scale.shape[-2:] != (1, 1):
            raise ValueError(f"scale has shape {tuple(scale.shape)}: give a number, or a tensor [*batch, 1, 1].")
        return LowRank(self.left * scale, self.right)

    __rmul__ = __mul__

    def __truediv__(self, scale: float | int | Tensor) -> LowRank:
        return self * (1 / scale)

    def __getitem__(self, index: Any) -> LowRank:
        """Index the leading dimensions only."""
        # The two full slices keep integers and ellipses from indexing the matrix dimensions.
        within = (*index, slice(None), slice(None)) if isinstance(index, tuple) else (index, slice(None), slice(None))
        return LowRank(*(factor[within] for factor in _expanded(self.batch_shape, self.left, self.right)))

    def __repr__(self) -> str:
        columns = self.left.shape[-1]
        return f"LowRank(shape={tuple(self.shape)}, rank≤{columns}, dtype={self.dtype}, device={self.device})"

    def _core(self, scaled: bool = False) -> Tensor:
        """A ``rank × rank`` matrix with the same singular values: the product of the R factors of both QRs.

        Gram matrices would be cheaper but lose half of the digits where terms cancel. With ``scaled``, the result is
        divided by a positive number, so that huge or tiny factors neither overflow nor underflow.
        """
        # LAPACK has no half precision.
        r_left, r_right = (torch.linalg.qr(factor.to(wide(factor))).R for factor in (self.left, self.right))
        if scaled and r_left.numel() and r_right.numel():
            sizes = (r.abs().amax((-2, -1), keepdim=True) for r in (r_left, r_right))
            r_left, r_right = (r / size.where(size > 0, 1) for r, size in zip((r_left, r_right), sizes, strict=True))
        return r_left @ r_right.mT


def _beside(a: Tensor, b: Tensor) -> Tensor:
    """The columns of both side by side, with leading dimensions broadcast."""
    return torch.cat(_expanded(require_broadcastable(this=a.shape[:-2], other=b.shape[:-2]), a, b), dim=-1)


def _expanded(batch: torch.Size, *factors: Tensor) -> list[Tensor]:
    return [factor.expand(*batch, *factor.shape[-2:]) for factor in factors]
