"""One edit for several queries at once, against NumPy's Moore–Penrose inverse; and where there is none."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import joint_weight_update, least_norm_edit, weight_update


@given(seed=st.integers(0, 10**6), many=st.integers(1, 6), out=st.integers(1, 7))
def test_joint_weight_update_against_numpy(seed, many, out):
    rng = np.random.default_rng(seed)
    weight, without, with_ = rng.normal(size=(out, 8)), rng.normal(size=(many, 8)), rng.normal(size=(many, 8))
    update = joint_weight_update(*map(torch.from_numpy, (weight, without, with_)))
    expected = weight @ (with_ - without).T @ np.linalg.pinv(without.T)
    size = np.linalg.norm(expected)
    np.testing.assert_allclose(update.dense().numpy(), expected, rtol=1e-8, atol=1e-10 * size)
    edited = (weight + update.dense().numpy()) @ without.T
    np.testing.assert_allclose(edited, weight @ with_.T, rtol=1e-8, atol=1e-12 * size)
    assert int(update.rank()) <= many


def test_one_query_is_the_theorem():
    weight, without, with_ = torch.randn(5, 4).double(), torch.randn(1, 4).double(), torch.randn(1, 4).double()
    one = weight_update(weight, without[0], with_[0])
    torch.testing.assert_close(joint_weight_update(weight, without, with_).dense(), one.dense(), rtol=1e-12, atol=1e-14)


def test_it_is_the_smallest_edit():
    reads, changes = torch.randn(3, 8).double(), torch.randn(3, 5).double()
    edit = least_norm_edit(reads, changes)
    other = torch.randn(5, 8).double()
    other = other - other @ torch.linalg.pinv(reads) @ reads  # acts on none of the reads
    for size in (1e-3, 1.0):
        rival = edit.dense() + size * other
        torch.testing.assert_close(reads @ rival.mT, changes, rtol=1e-10, atol=1e-12)
        assert rival.norm() > edit.norm()


def test_outside_its_queries_it_is_only_a_fit():
    weight, without, with_ = torch.randn(5, 8).double(), torch.randn(4, 8).double(), torch.randn(4, 8).double()
    edited = weight + joint_weight_update(weight, without[:3], with_[:3]).dense()
    assert (edited @ without[3] - weight @ with_[3]).norm() > 1e-2


def test_batches():
    reads, changes = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 5).double()
    edit = least_norm_edit(reads, changes)
    assert edit.shape == (2, 5, 8)
    torch.testing.assert_close(edit[1].dense(), least_norm_edit(reads[1], changes[1]).dense(), rtol=1e-12, atol=1e-14)


def test_huge_and_tiny_vectors_are_as_good_as_others():
    reads, changes = torch.randn(3, 8).double(), torch.randn(3, 5).double()
    for scale in (1e-200, 1e150):
        edit = least_norm_edit(scale * reads, changes)
        torch.testing.assert_close((edit @ (scale * reads).mT).mT, changes, rtol=1e-10, atol=1e-10)


ROWS = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("reads", "changes", "says"),
    [
        (torch.stack([ROWS[0], ROWS[0]]), ROWS, "not linearly independent"),
        (torch.stack([ROWS[0], -2 * ROWS[0]]), ROWS, "not linearly independent"),
        (torch.stack([ROWS[0], 0 * ROWS[0]]), ROWS, "not linearly independent"),
        (torch.randn(5, 4).double(), torch.randn(5, 4).double(), "5 vectors of width 4 are not linearly independent"),
        (ROWS, ROWS[:1], "give one change for each read"),
        (ROWS[0], ROWS, r"reads has shape \(4,\)"),
        (ROWS * float("nan"), ROWS, r"reads\[0, 0\] is nan"),
    ],
)
def test_bad_arguments_are_named(reads, changes, says):
    with pytest.raises(ValueError, match=says):
        least_norm_edit(reads, changes)
