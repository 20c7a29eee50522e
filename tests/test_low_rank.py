"""LowRank against NumPy on the dense matrix."""

import numpy as np
import pytest
import torch
from cases import normal
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import LowRank

BATCHES = [((), ()), ((3,), (3,)), ((3,), (1,)), ((2, 1), (2, 4)), ((0,), (0,))]


def draw(seed, left_batch=(), right_batch=(), out=5, in_=4, columns=2, dtype=torch.float64):
    return LowRank(*normal((*left_batch, out, columns), (*right_batch, in_, columns), seed=seed, dtype=dtype))


def numpy_dense(low_rank):
    return np.einsum("...or,...ir->...oi", low_rank.left.numpy(), low_rank.right.numpy())


@pytest.mark.parametrize("batches", BATCHES, ids=str)
@pytest.mark.parametrize("columns", [1, 2, 7])
def test_acts_as_its_dense_matrix(batches, columns):
    a = draw(0, *batches, columns=columns)
    dense = numpy_dense(a)
    assert a.shape == dense.shape
    np.testing.assert_allclose(a.dense(), dense, rtol=1e-12)
    x, m, y = torch.randn(4).double(), torch.randn(4, 6).double(), torch.randn(5).double()
    np.testing.assert_allclose(a @ x, dense @ x.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(a @ m, dense @ m.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(y @ a, y.numpy() @ dense, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(a.matvec(x), dense @ x.numpy(), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(a.mT.dense(), np.swapaxes(dense, -1, -2), rtol=1e-12)
    np.testing.assert_allclose(a.norm(), np.linalg.norm(dense, axis=(-2, -1)), rtol=1e-12)


@pytest.mark.parametrize("batches", BATCHES, ids=str)
def test_arithmetic(batches):
    a, b = draw(0, *batches, columns=1), draw(1, *batches, columns=2)
    dense_a, dense_b = numpy_dense(a), numpy_dense(b)
    weight = torch.randn(5, 4).double()
    for actual, expected in [
        ((a + b).dense(), dense_a + dense_b),
        ((a - b).dense(), dense_a - dense_b),
        ((-a).dense(), -dense_a),
        ((2.5 * a).dense(), 2.5 * dense_a),
        ((a * 2.5).dense(), 2.5 * dense_a),
        (weight + a, weight.numpy() + dense_a),
        (a + weight, weight.numpy() + dense_a),
        (weight - a, weight.numpy() - dense_a),
        (a - weight, dense_a - weight.numpy()),
        ((a @ b.mT).dense(), dense_a @ np.swapaxes(dense_b, -1, -2)),
        (a.inner(b), (dense_a * dense_b).sum((-2, -1))),
    ]:
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_rank_and_singular_values(out, in_, columns, seed):
    a = draw(seed, out=out, in_=in_, columns=columns)
    dense = numpy_dense(a)
    values = np.linalg.svd(dense, compute_uv=False)
    got = a.singular_values().numpy()
    np.testing.assert_allclose(got[: len(values)], values[: len(got)], rtol=1e-10, atol=1e-12 * values[0])
    assert int(a.rank()) == np.linalg.matrix_rank(dense) == min(out, in_, columns)


def test_rank_sees_through_redundant_columns():
    a = draw(0, columns=1)
    assert int((a + a + a).rank()) == 1
    assert int((a + draw(1, columns=1)).rank()) == 2  # negative control
    assert int((0.0 * a).rank()) == 0


def test_norm_keeps_its_digits_where_terms_cancel():
    a, tiny = draw(0, columns=1), 1e-9 * draw(1, columns=1)
    cancelled = a + tiny - a
    np.testing.assert_allclose(cancelled.norm(), tiny.norm(), rtol=1e-6)  # cancellation leaves 1e-16 / 1e-9
    gram = ((cancelled.left.mT @ cancelled.left) * (cancelled.right.mT @ cancelled.right)).sum().clamp(min=0).sqrt()
    assert abs(gram / tiny.norm() - 1) > 0.1  # the cheaper formula loses all of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_its_dtype(dtype):
    a = draw(0, (3,), (3,), dtype=dtype)
    for result in (
        a.dense(),
        a.norm(),
        a.singular_values(),
        a.inner(a),
        (a + a).left,
        a.to(torch.float64).to(dtype).left,
    ):
        assert result.dtype == dtype
    assert a.rank().tolist() == [2, 2, 2]


def test_indexing_reaches_the_leading_dimensions_only():
    a = draw(0, (3, 1), (3, 4))
    dense = a.dense()
    for index in [0, (1, 2), slice(1, 3), torch.tensor([2, 0]), (slice(None), 3), None, ...]:
        torch.testing.assert_close(a[index].dense(), dense[index], rtol=0, atol=1e-14)
    square = draw(0, (3, 4), (3, 4), out=5, in_=5)
    for index in [(..., 0), (0, ...), (..., slice(1, 3)), torch.rand(3, 4) > 0.5]:
        torch.testing.assert_close(square[index].dense(), square.dense()[_whole(index)], rtol=0, atol=1e-14)
    assert draw(0)[None].shape == (1, 5, 4)
    for low_rank, index in [(a, (0, 0, 0)), (a, 3), (square, (0, 0, 0)), (draw(0), 0)]:
        with pytest.raises(IndexError):
            low_rank[index]


def _whole(index):
    """The same index of the leading dimensions for a dense matrix."""
    return (*index, slice(None), slice(None)) if isinstance(index, tuple) else index


def test_sums_and_strangers():
    a, b = draw(0, columns=1), draw(1, columns=1)
    assert isinstance(sum([a, b]), LowRank)
    torch.testing.assert_close(sum([a, b]).dense(), a.dense() + b.dense())
    torch.testing.assert_close((a / 2).dense(), a.dense() / 2)
    for strange in (lambda: a @ 2.0, lambda: a + "b", lambda: np.ones(5) @ a, lambda: a + np.ones((5, 4))):
        with pytest.raises(TypeError):
            strange()
    with pytest.raises(ValueError, match="dtype"):
        a + b.to(torch.float32)
    with pytest.raises(ValueError, match="sizes must agree"):
        a.inner(draw(0, out=6))


@pytest.mark.parametrize("magnitude", [1e-200, 1.0, 1e200])
def test_rank_at_any_magnitude(magnitude):
    a = draw(0, columns=2)
    assert int(LowRank(magnitude * a.left, magnitude * a.right).rank()) == 2


def test_no_columns_at_all():
    empty = LowRank(torch.zeros(5, 0), torch.zeros(4, 0))
    assert int(empty.rank()) == 0
    assert empty.norm() == 0


@pytest.mark.parametrize("columns", [1, 2])
def test_norm_is_differentiable(columns):
    a = draw(0, columns=columns)
    factors = (a.left.requires_grad_(), a.right.requires_grad_())
    assert torch.autograd.gradcheck(lambda left, right: LowRank(left, right).norm(), factors)


@pytest.mark.parametrize(
    ("left", "right", "says"),
    [
        (torch.zeros(3), torch.zeros(4, 1), r"left has shape \(3,\)"),
        (torch.zeros(3, 1), torch.zeros(4, 2), "left has 1 columns and right has 2"),
        (torch.zeros(3, 1), torch.zeros(4, 1).double(), "right.dtype is torch.float64"),
        (torch.zeros(3, 1), torch.zeros(4, 1, device="meta"), "right.device is meta"),
        (torch.zeros(3, 1, dtype=torch.int64), torch.zeros(4, 1), "left has dtype torch.int64"),
        (torch.zeros(2, 3, 1), torch.zeros(5, 4, 1), "do not broadcast"),
        ([[1.0]], torch.zeros(4, 1), "left is a list"),
    ],
)
def test_bad_factors_are_named(left, right, says):
    with pytest.raises(ValueError, match=says):
        LowRank(left, right)


def test_adding_another_size_is_an_error():
    with pytest.raises(ValueError, match="out and in must agree"):
        draw(0) + draw(0, out=6)
    with pytest.raises(ValueError, match="give a number"):
        draw(0) * torch.ones(4)
