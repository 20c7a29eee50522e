"""The best layers of linear attention: closed forms against Monte Carlo, an optimiser, and layers that are run."""

import numpy as np
import pytest
import torch
from cases import normal, relative

from icl_lib import symbolic
from icl_lib.constructions import (
    best_rates,
    descent_error,
    gaussian_prompts,
    gradient_descent_attention,
    in_turn,
    merged,
    one_layer_loss,
    one_layer_optimum,
    rates_loss,
    train_linear_attention,
    train_preconditioners,
)


def covariance(*eigenvalues, seed=0):
    """A covariance with these eigenvalues, its eigenvectors, and its inverse."""
    (matrix,) = normal((len(eigenvalues),) * 2, seed=seed)
    vectors = torch.linalg.qr(matrix)[0]
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return vectors @ torch.diag(values) @ vectors.T, vectors, vectors @ torch.diag(1 / values) @ vectors.T


def layer_with(preconditioner, examples):
    zero = torch.zeros(1, len(preconditioner)).double()
    return gradient_descent_attention(zero, 1.0, examples, preconditioner=preconditioner).requires_grad_(False)


class TestOneLayer:
    @pytest.mark.parametrize(("eigenvalues", "examples"), [((2.0, 1.0, 0.1), 7), ((3.0,), 1), ((1.0, 0.01), 40)])
    def test_one_layer_optimum(self, eigenvalues, examples):
        sigma, vectors, _ = covariance(*eigenvalues)
        values, n = np.array(eigenvalues), examples
        optimum = one_layer_optimum(sigma, n)
        of_ahn = vectors.numpy() @ np.diag(1 / ((n + 1) / n * values + values.sum() / n)) @ vectors.numpy().T
        np.testing.assert_allclose(optimum, of_ahn, rtol=1e-12, atol=1e-12)
        derived = symbolic.one_layer_optimum().lambdify()(sigma.numpy(), np.array(float(n)))
        np.testing.assert_allclose(optimum, derived, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("white", [True, False])
    def test_an_optimiser_finds_the_same(self, white):
        """L-BFGS minimises the expected loss; that this is the loss is tested by Monte Carlo and quadrature."""
        sigma, _, inverse = covariance(2.0, 1.0, 0.3)
        tasks = None if white else inverse
        A = torch.zeros(3, 3).double().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [A], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            optimiser.zero_grad()
            loss = one_layer_loss(A, sigma, 9, tasks)
            loss.backward()
            return loss

        optimiser.step(closure)
        wanted = one_layer_optimum(sigma, 9, tasks)
        assert ((A - wanted).norm() / wanted.norm()).item() < 1e-6
        if not white:
            torch.testing.assert_close(wanted, 9 / (9 + 3 + 1) * inverse, rtol=1e-12, atol=1e-12)
        other = one_layer_optimum(sigma, 9, inverse if white else None)  # the control: other tasks
        assert ((A - other).norm() / wanted.norm()).item() > 0.1

    def test_the_loss_is_that_of_a_layer_that_runs(self):
        """Within three standard errors of Monte Carlo, for the optimum and for a matrix that is not symmetric."""
        sigma, _, inverse = covariance(2.0, 1.0, 0.3)
        (any_matrix,) = normal((3, 3), seed=4)
        generator = torch.Generator().manual_seed(0)
        for tasks in (None, inverse):
            for A in (one_layer_optimum(sigma, 6, tasks), 0.3 * any_matrix):
                context, query, target = gaussian_prompts(200_000, 6, sigma, generator, tasks)
                squared = (layer_with(A, 6)(context, query)[:, -1] + target).square()
                error = squared.std() / len(squared) ** 0.5
                assert (squared.mean() - one_layer_loss(A, sigma, 6, tasks)).abs() < 3 * error
                assert (squared.mean() - one_layer_loss(A, sigma, 60, tasks)).abs() > 10 * error  # the control

    @pytest.mark.slow
    def test_training_finds_it(self):
        sigma, *_ = covariance(2.0, 1.0, 0.5)
        optimum = one_layer_optimum(sigma, 12)
        trained, untrained = train_linear_attention(12, 3, 900, 256, 2e-2, covariance=sigma, decay=True)
        found, start = (
            -12 * one.value.weight[-1, -1] * one.query.weight[:3, :3] for one in (merged(trained), merged(untrained))
        )
        assert ((found - optimum).norm() / optimum.norm()).item() < 0.05
        assert ((start - optimum).norm() / optimum.norm()).item() > 0.5
        assert one_layer_loss(found, sigma, 12) / one_layer_loss(optimum, sigma, 12) < 1.01


class TestLayers:
    def test_layers_are_preconditioned_steps(self):
        sigma, *_ = covariance(2.0, 1.0, 0.3)
        matrices = list(normal(*[(3, 3)] * 3, seed=1))
        context, query, target = gaussian_prompts(5, 8, sigma, torch.Generator().manual_seed(2))
        after = in_turn([layer_with(A, 8) for A in matrices], context, query)
        x, y, w = context[..., :3].numpy(), context[..., 3].numpy(), np.zeros((5, 3))
        for step, A in enumerate(matrices):
            slope = np.einsum("bn,bni->bi", np.einsum("bni,bi->bn", x, w) - y, x) / 8
            w = w - slope @ A.numpy()
            np.testing.assert_allclose(-after[:, step + 1, -1, -1], (w * query[:, :3].numpy()).sum(1), rtol=1e-11)
        task = np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(x, y, strict=True)])
        sample = torch.as_tensor(np.einsum("bni,bnj->bij", x, x) / 8)
        missed = torch.einsum("bi,bij,bj->b", torch.as_tensor(task), descent_error(matrices, sample), query[:, :3])
        torch.testing.assert_close(target + after[:, -1, -1, -1], missed, rtol=1e-9, atol=1e-9)
        swapped = in_turn([layer_with(A, 8) for A in reversed(matrices)], context, query)
        assert relative(swapped[:, -1, -1, -1:], after[:, -1, -1, -1:]) > 1e-3  # the control: another order

    @pytest.mark.parametrize(("layers", "features", "examples"), [(1, 4, 3), (2, 2, 6), (3, 5, 20)])
    def test_best_rates(self, layers, features, examples):
        rates, loss = best_rates(layers, features, examples)
        x = torch.randn(200_000, examples, features, generator=torch.Generator().manual_seed(0)).double()
        values = torch.linalg.eigvalsh(x.mT @ x / examples)
        missed = (1 - values[..., None] * rates).prod(-1).square().sum(-1)
        assert (missed.mean() - loss).abs() < 3 * missed.std() / len(missed) ** 0.5
        for at in range(layers):  # the control: no other rate is better
            for change in (0.8, 1.25):
                moved = rates.clone()
                moved[at] *= change
                assert (1 - values[..., None] * moved).prod(-1).square().sum(-1).mean() > missed.mean()
        assert rates_loss(rates.tolist(), features, examples) == pytest.approx(loss, rel=1e-10)
        if layers == 1:
            assert rates.item() == pytest.approx(examples / (examples + features + 1), rel=1e-12)

    @pytest.mark.slow
    def test_training_finds_the_inverse_covariance(self):
        sigma, _, inverse = covariance(1.0, 1.0, 0.25)
        rates, loss = best_rates(2, 3, 12)
        _, history = train_preconditioners(2, sigma, 12, inverse, steps=700, batch=256)
        scales = []
        for A in history[-1]:
            scales.append((A * sigma).sum().item() / 3)
            assert ((A - scales[-1] * inverse).norm() / A.norm()).item() < 0.05
            assert ((A - A.trace() / 3 * torch.eye(3)).norm() / A.norm()).item() > 0.3  # the control: not plain descent
        np.testing.assert_allclose(sorted(scales), rates, rtol=0.05)
        context, query, target = gaussian_prompts(20_000, 12, sigma, torch.Generator().manual_seed(7), inverse)
        run = in_turn([layer_with(A, 12) for A in history[-1]], context, query)[:, -1, -1, -1]
        assert (run + target).square().mean().item() == pytest.approx(loss, rel=0.1)


def test_errors():
    sigma, *_ = covariance(2.0, 1.0)
    zero = torch.zeros(1, 2).double()
    for bad, match in (
        (lambda: one_layer_optimum(-sigma, 3), "covariance is not symmetric and positive definite"),
        (lambda: one_layer_optimum(sigma[:1], 3), r"covariance has shape \(1, 2\): give a square matrix"),
        (lambda: one_layer_optimum(sigma, 0), "examples is 0"),
        (lambda: one_layer_optimum(sigma, 3, torch.eye(3).double()), "tasks has shape"),
        (lambda: one_layer_loss(torch.eye(3).double(), sigma, 3), "preconditioner has shape"),
        (lambda: best_rates(0, 2, 3), "layers is 0"),
        (lambda: gradient_descent_attention(zero, 1.0, 3, preconditioner=torch.eye(3).double()), "preconditioner has"),
        (lambda: train_linear_attention(3, 3, covariance=sigma), r"covariance has shape \(2, 2\): give \(3, 3\)"),
        (lambda: train_preconditioners(1, sigma, 3, every=0), "every is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
