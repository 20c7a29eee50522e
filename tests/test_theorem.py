"""The formulas against independent oracles: a least-norm solver and the derivation."""

import numpy as np
import pytest
import torch
from cases import normal
from hypothesis import given
from hypothesis import strategies as st

from icl_lib import bias_update, symbolic, weight_update


def draw(seed, out=4, in_=3, dtype=torch.float64):
    return normal((out, in_), (in_,), (in_,), seed=seed, dtype=dtype)


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_is_the_least_norm_solution(out, in_, seed):
    weight, a_without, a_with = draw(seed, out, in_)
    # The constraint X a₀ = W(a_C − a₀) as a linear system in vec(X); lstsq returns its solution of least norm.
    system = np.kron(np.eye(out), a_without.numpy())
    right_side = (weight @ (a_with - a_without)).numpy()
    oracle = np.linalg.lstsq(system, right_side, rcond=None)[0].reshape(out, in_)
    update = weight_update(weight, a_without, a_with)
    np.testing.assert_allclose(update.dense(), oracle, rtol=1e-10, atol=1e-12 * np.abs(oracle).max())
    assert int(update.rank()) == 1


@pytest.mark.parametrize(("out", "in_"), [(3, 2), (4, 3)])
def test_is_what_the_derivation_yields(out, in_):
    weight, a_without, a_with = draw(0, out, in_)
    formula = symbolic.weight_update(out, in_).lambdify("torch")
    derived = torch.as_tensor(formula(weight, a_without, a_with))
    torch.testing.assert_close(weight_update(weight, a_without, a_with).dense(), derived, rtol=1e-12, atol=1e-14)
    other = weight_update(weight, a_with, a_without).dense()  # negative control: the roles exchanged
    assert not torch.allclose(other, derived, rtol=1e-3)


def test_bias_update_is_what_the_derivation_yields():
    _, a_without, a_with = draw(0)
    formula = symbolic.bias_update().lambdify("torch")
    derived = torch.as_tensor(formula(a_without, a_with)).reshape(-1)
    torch.testing.assert_close(bias_update(a_without, a_with), derived, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batches", [((), ()), ((5,), (5,)), ((2, 1), (2, 4)), ((), (6,)), ((0,), (0,))], ids=str)
def test_batches_are_single_updates_stacked(batches):
    weight = draw(0)[0]
    a_without, a_with = torch.randn(*batches[0], 3).double(), torch.randn(*batches[1], 3).double()
    update = weight_update(weight, a_without, a_with)
    batch = torch.broadcast_shapes(*batches)
    assert update.shape == (*batch, 4, 3)
    for index in np.ndindex(*batch):
        single = weight_update(weight, a_without.expand(*batch, 3)[index], a_with.expand(*batch, 3)[index])
        torch.testing.assert_close(update.dense()[index], single.dense(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("magnitude", [1e-300, 1e-200, 1e-20, 1.0, 1e20, 1e150, 1e300])
def test_no_epsilon_at_any_magnitude(magnitude):
    weight, a_without, a_with = draw(0)
    a_without, a_with = magnitude * a_without, magnitude * a_with
    update = weight_update(weight, a_without, a_with)
    residual = (weight + update) @ a_without - weight @ a_with
    assert residual.abs().max() <= 1e-14 * (weight @ a_with).abs().max()  # a norm would overflow at the largest


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 4e-2)])
def test_precision_follows_the_dtype(dtype, bound):
    weight, a_without, a_with = draw(0, 64, 32, dtype=dtype)
    update = weight_update(weight, a_without, a_with)
    assert update.dtype == dtype
    residual = ((weight + update) @ a_without - weight @ a_with).double().norm() / (weight @ a_with).double().norm()
    assert residual < bound
    without_update = (weight @ a_without - weight @ a_with).double().norm() / (weight @ a_with).double().norm()
    assert without_update > 0.5  # negative control


def test_is_differentiable():
    weight, a_without, a_with = (tensor.requires_grad_() for tensor in draw(0))
    assert torch.autograd.gradcheck(lambda *args: weight_update(*args).dense(), (weight, a_without, a_with))


GOOD = draw(1)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("weight", "a_without", "a_with", "says"),
    [
        (None, torch.zeros(3).double(), None, r"a_without is zero.*Keep a token"),
        (None, torch.tensor([[1.0, 0, 0], [0, 0, 0]]).double(), None, r"a_without\[1\] is zero"),
        (None, torch.tensor([1.0, NAN, 0]).double(), None, r"a_without\[1\] is nan.*contextual layer"),
        (None, torch.tensor([1.0, INF, 0]).double(), None, r"a_without\[1\] is inf"),
        (None, None, torch.tensor([1.0, 0, -INF]).double(), r"a_with\[2\] is -inf"),
        (torch.full((4, 3), NAN).double(), None, None, r"weight\[0, 0\] is nan.*finite weights"),
        (None, torch.ones(2).double(), None, "a_with has 3 features and a_without has 2"),
        (None, torch.ones(2).double(), torch.ones(2).double(), "Is the weight transposed"),
        (torch.ones(3).double(), None, None, r"weight has shape \(3,\)"),
        (torch.ones(2, 4, 3).double(), None, None, r"weight has shape \(2, 4, 3\): give one matrix"),
        (None, torch.ones(3), None, r"a_with.dtype is torch.float64 but a_without.dtype is torch.float32"),
        (torch.ones(4, 3), None, None, r"a_without.dtype is torch.float64 but weight.dtype is torch.float32"),
        (torch.ones(4, 3).long(), None, None, r"weight has dtype torch.int64.*weight.to"),
        (torch.ones(4, 3, device="meta").double(), None, None, "weight.device is meta.*materialise"),
        (None, torch.ones(2, 3).double(), torch.ones(5, 3).double(), "do not broadcast"),
        (None, [1.0, 2.0, 3.0], None, "a_without is a list.*as_tensor"),
        (None, torch.tensor([1e-320, 0, 0], dtype=torch.float64), None, "too large for torch.float64.*wider dtype"),
    ],
)
def test_bad_input_names_argument_place_and_remedy(weight, a_without, a_with, says):
    given_ = [good if bad is None else bad for good, bad in zip(GOOD, (weight, a_without, a_with), strict=True)]
    before = [tensor.clone() if isinstance(tensor, torch.Tensor) else list(tensor) for tensor in given_]
    with pytest.raises(ValueError, match=says):
        weight_update(*given_)
    for tensor, copy in zip(given_, before, strict=True):
        if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


def test_bias_update_checks_its_input():
    with pytest.raises(ValueError, match=r"a_with\[0\] is nan"):
        bias_update(torch.ones(1), torch.tensor([NAN]))
    with pytest.raises(ValueError, match="features"):
        bias_update(torch.ones(1), torch.ones(2))
