"""The edits that add the residual difference: last matrix, norm's scale, or both; against NumPy and a real norm."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from icl_lib import output_update, scale_update, turning_update


def norm_of(scale, eps=1e-6):
    norm = nn.RMSNorm(len(scale), eps=eps).double()
    with torch.no_grad():
        norm.weight.copy_(scale)
    return norm


@given(seed=st.integers(0, 10**6), width=st.integers(1, 9), out=st.integers(1, 5))
def test_output_update_against_numpy(seed, width, out):
    rng = np.random.default_rng(seed)
    change, hidden, weight = rng.normal(size=(3, out)), rng.normal(size=(3, width)), rng.normal(size=(out, width))
    update = output_update(torch.from_numpy(change), torch.from_numpy(hidden))
    for k in range(3):
        dense = np.outer(change[k], hidden[k]) / (hidden[k] @ hidden[k])
        np.testing.assert_allclose(update[k].dense().numpy(), dense, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose((weight + dense) @ hidden[k], weight @ hidden[k] + change[k], rtol=1e-9, atol=1e-12)


def test_output_update_of_huge_and_tiny_activations():
    change = torch.randn(4).double()
    for size in (1e-200, 1e200):
        hidden = size * torch.randn(6).double()
        update = output_update(change, hidden)
        torch.testing.assert_close(update @ hidden, change, rtol=1e-12, atol=1e-14)


def test_scale_update_through_a_norm():
    read, scale, change = torch.randn(7).double(), 1 + 0.3 * torch.randn(7).double(), torch.randn(7).double()
    normed = norm_of(torch.ones(7))(read).detach()
    edited = norm_of(scale + scale_update(change, normed))
    torch.testing.assert_close(edited(read), norm_of(scale)(read) + change, rtol=1e-12, atol=1e-12)
    assert (norm_of(scale)(read) - edited(read)).norm() > 0.1


def test_a_feature_that_is_zero_is_zero_for_every_scale():
    normed = torch.tensor([1.0, 0.0, 2.0])
    with pytest.raises(ValueError, match=r"normed\[1\] is zero: this feature of the norm's output"):
        scale_update(torch.ones(3), normed)
    assert scale_update(torch.tensor([1.0, 0.0, 1.0]), normed).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("shared", [False, True])
def test_turning_through_a_norm(eps, shared):
    """For every epsilon: the turned input has the length of the old one, so the norm divides both by the same."""
    read, scale, wanted = torch.randn(3, 40).double(), 1 + 0.3 * torch.rand(40).double(), torch.randn(3, 40).double()
    normed = norm_of(torch.ones(40), eps)(read).detach()
    change, new = turning_update(wanted, read, normed, scale, shared)
    turned = read + change
    torch.testing.assert_close(turned.norm(dim=-1), read.norm(dim=-1), rtol=1e-11, atol=0)
    for k in range(3):
        answer = norm_of(new if shared else new[k], eps)(turned[k]).detach()
        torch.testing.assert_close(answer, wanted[k], rtol=1e-11, atol=1e-11)
        with_old_scale = norm_of(scale, eps)(turned[k]).detach()
        assert (with_old_scale - wanted[k]).norm() > 1e-2
    if shared:
        assert new.shape == scale.shape
        assert (new / scale).min() > 0
        # Stationary: 1/γ'^2 over 1/γ^2 is the exponential of a linear combination of the vectors' shares.
        log = torch.log(scale**2 / new**2)
        shares = (wanted / scale).square()
        basis = torch.cat([shares, torch.ones(1, 40).double()])
        residual = log - torch.linalg.lstsq(basis.mT, log).solution @ basis
        assert residual.norm() < 1e-9 * log.norm()
    else:
        ratio = new / scale
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-12, atol=0)


def test_no_shared_scale_for_vectors_of_one_direction_and_two_lengths():
    wanted = torch.randn(1, 8).double() * torch.tensor([[1.0], [2.0]]).double()
    read = torch.randn(2, 8).double()
    normed = norm_of(torch.ones(8))(read).detach()
    with pytest.raises(ValueError, match="no scale of the norm was found that serves all 2 vectors"):
        turning_update(wanted, read, normed, torch.ones(8).double(), shared=True)


ONE, NAN = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: output_update(ONE, torch.zeros(3)), "hidden is zero: .*outer='bias'"),
        (lambda: output_update(NAN, ONE), r"change\[1\] is nan"),
        (lambda: output_update(ONE, ONE.double()), "hidden.dtype is torch.float64"),
        (lambda: output_update([1.0], ONE), "change is a list"),
        (lambda: output_update(3e38 * ONE, 1e-30 * ONE), "Δh/‖y‖ is too large for torch.float32"),
        (lambda: scale_update(ONE, NAN), r"normed\[1\] is nan"),
        (lambda: scale_update(3e38 * ONE, 1e-30 * ONE), "Δh/ō is too large"),
        (lambda: turning_update(ONE[None], ONE[None], ONE[None], torch.tensor([1.0, 0.0, 1.0])), r"scale\[1\] is zero"),
        (lambda: turning_update(0 * ONE[None], ONE[None], ONE[None], ONE), r"wanted\[0\] is zero"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
