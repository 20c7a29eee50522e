"""One edit for many reads: least squares against NumPy and autograd, and what an edit misses elsewhere."""

import numpy as np
import pytest
import torch
from cases import normal

from icl_lib import (
    least_norm_edit,
    least_squares_edit,
    share_served,
    static_update,
    symbolic,
    transfer_error,
    weight_update,
)


@pytest.mark.parametrize("many", [3, 12])
@pytest.mark.parametrize("ridge", [0.0, 0.7])
def test_least_squares_edit(many, ridge):
    reads, changes = normal((many, 6), (many, 4))
    counts = torch.arange(1.0, many + 1).double()
    edit = least_squares_edit(reads, changes, ridge, counts).dense()
    loss = lambda M: (counts[:, None] * (reads @ M.mT - changes).square()).sum() + ridge * M.square().sum()  # noqa: E731
    slope = torch.autograd.functional.jacobian(loss, edit)
    assert slope.abs().max() < 1e-11
    R, H = (part * counts[:, None].sqrt() for part in (reads, changes))
    if ridge:
        wanted = np.linalg.solve((R.mT @ R + ridge * torch.eye(6).double()).numpy(), (R.mT @ H).numpy()).T
        derived = symbolic.least_squares_edit().lambdify()(R.mT.numpy(), H.mT.numpy(), np.array(ridge))
        np.testing.assert_allclose(edit.numpy(), derived, rtol=1e-10, atol=1e-13)
    else:
        wanted = (np.linalg.pinv(R.numpy()) @ H.numpy()).T
    np.testing.assert_allclose(edit.numpy(), wanted, rtol=1e-10, atol=1e-13)
    assert loss(edit + 1e-3 * normal((4, 6), seed=1)[0]) > loss(edit)
    if many == 3 and not ridge:
        torch.testing.assert_close(edit, least_norm_edit(reads, changes).dense(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("many", [3, 12])
def test_a_guard_is_left_alone(many):
    reads, changes, guard = normal((many, 6), (many, 4), (5, 6))
    found = least_squares_edit(reads, changes, 0.3, guard=guard)
    assert found.left.shape[-1] <= min(many, 6)
    gram = (reads.mT @ reads + guard.mT @ guard + 0.3 * torch.eye(6).double()).numpy()
    np.testing.assert_allclose(
        found.dense().numpy(), np.linalg.solve(gram, (reads.mT @ changes).numpy()).T, rtol=1e-10, atol=1e-13
    )
    free = least_squares_edit(reads, changes, 0.3)
    assert found.matvec(guard).norm() < 0.7 * free.matvec(guard).norm()
    strict = least_squares_edit(reads[:1], changes[:1], 1e-9, guard=1e3 * guard)  # a sixth direction is free
    assert strict.matvec(guard).norm() < 1e-3 * strict.matvec(reads[:1]).norm()
    torch.testing.assert_close(strict.matvec(reads[:1]), changes[:1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("many", [4, 15])
def test_a_rank_is_the_best_of_its_rank(many):
    """Reduced-rank regression: no matrix of this rank that gradient descent finds does better."""
    reads, changes = normal((many, 6), (many, 5))
    found = least_squares_edit(reads, changes, 0.3, rank=2)
    assert found.left.shape[-1] == found.right.shape[-1] == 2

    def loss(L, R):
        M = L @ R.mT
        return (reads @ M.mT - changes).square().sum() + 0.3 * M.square().sum()

    least = loss(found.left, found.right)
    factors = [part.clone().requires_grad_() for part in normal((5, 2), (6, 2), seed=3)]
    optimizer = torch.optim.LBFGS(factors, max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(*factors)
        value.backward()
        return value

    optimizer.step(closure)
    assert least <= loss(*factors) + 1e-9
    full = least_squares_edit(reads, changes, 0.3)
    cut = torch.linalg.svd(full.dense())
    assert loss(cut.U[:, :2] * cut.S[:2], cut.Vh[:2].mT) > least + 1e-6  # the plain cut of the matrix is worse
    torch.testing.assert_close(least_squares_edit(reads, changes, 0.3, rank=9).dense(), full.dense())


def test_static_update():
    W, a_0, a_C = normal((3, 4), (50, 4), (50, 4))
    update, delta = static_update(W, a_0, a_C), a_C - a_0
    derived = symbolic.static_update().lambdify()(W.numpy(), a_0.mT.numpy(), delta.mT.numpy())
    np.testing.assert_allclose(update.dense().numpy(), derived, rtol=1e-10, atol=1e-13)
    means = {name: (x.mT @ y / 50).numpy() for name, (x, y) in {"dd": (delta, delta), "da": (delta, a_0)}.items()}
    served = means["da"] @ np.linalg.inv((a_0.mT @ a_0 / 50).numpy()) @ means["da"].T
    left = (delta @ W.mT - update.matvec(a_0)).square().sum(-1).mean().item()
    assert left == pytest.approx(np.trace(W.numpy() @ (means["dd"] - served) @ W.numpy().T), rel=1e-10)
    assert 1 - left / (delta @ W.mT).square().sum(-1).mean().item() == pytest.approx(
        share_served(update, a_0, delta @ W.mT).item()
    )
    one = static_update(W, a_0[:1], a_C[:1]).dense()
    torch.testing.assert_close(one, weight_update(W, a_0[0], a_C[0]).dense(), rtol=1e-10, atol=1e-12)
    S = normal((4, 4), seed=7)[0]
    linear = static_update(W, a_0, a_0 + a_0 @ S.mT)
    torch.testing.assert_close(linear.dense(), W @ S, rtol=1e-9, atol=1e-11)  # a linear change is served in full
    assert static_update(W, a_0, a_C, ridge=10.0).norm() < update.norm()


def test_transfer_error():
    W, a_0, a_C, other_0, other_C = normal((3, 4), (4,), (4,), (4,), (4,))
    edited = W + weight_update(W, a_0, a_C).dense()
    missed = transfer_error(W, a_0, a_C, other_0, other_C)
    torch.testing.assert_close(missed, W @ other_C - edited @ other_0, rtol=1e-12, atol=1e-13)
    derived = symbolic.transfer_error().lambdify()(*(part.numpy() for part in (W, a_0, a_C, other_0, other_C)))
    np.testing.assert_allclose(missed.numpy(), derived, rtol=1e-12, atol=1e-13)
    assert transfer_error(W, a_0, a_C, a_0, a_C).abs().max() < 1e-13
    assert missed.norm() > 0.1
    batch = transfer_error(W, a_0, a_C, torch.stack([a_0, other_0]), torch.stack([a_C, other_C]))
    torch.testing.assert_close(batch[1], missed)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: least_squares_edit(torch.eye(3), torch.eye(2)), "one change for each"),
        (lambda: least_squares_edit(torch.eye(2), torch.eye(2), -1.0), r"ridge is -1\.0"),
        (lambda: least_squares_edit(torch.eye(2), torch.eye(2), counts=-torch.ones(2)), "counts are"),
        (lambda: least_squares_edit(torch.eye(2), torch.eye(2), rank=0), "rank is 0"),
        (lambda: least_squares_edit(torch.eye(2), torch.eye(2), guard=torch.eye(3)), "guard has shape"),
        (lambda: transfer_error(torch.eye(2), torch.zeros(2), *[torch.ones(2)] * 3), "a_without is zero"),
        (lambda: static_update(torch.eye(2), torch.ones(3, 3), torch.ones(3, 3)), "weight has shape"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()
