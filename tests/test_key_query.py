"""Heads with merged and with separate keys and queries: what they compute, and how they learn."""

import numpy as np
import pytest
import torch

from icl_lib import symbolic
from icl_lib.constructions import (
    LinearHeads,
    LinearSelfAttention,
    cubic_features,
    cubic_mlp,
    descend,
    gaussian_prompts,
    initial_strength,
    loss_on,
    merged_time_course,
    one_layer_loss,
    one_layer_optimum,
    pauses,
    plateau_losses,
)


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-12)


def prompts(count, examples, covariance, seed=0):
    return gaussian_prompts(count, examples, covariance, torch.Generator().manual_seed(seed))


def heads(rank=None, count=3, seed=1):
    return LinearHeads(features=4, heads=count, rank=rank, scale=0.5, seed=seed).double()


SIGMA = torch.diag(torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64))


class TestHeads:
    @pytest.mark.parametrize("rank", [None, 1, 3])
    def test_they_are_heads_of_linear_attention(self, rank):
        layer, (context, query, _) = heads(rank), prompts(6, 7, SIGMA)
        summed = torch.zeros_like(query)
        for v, inner in zip(layer.corner, layer.key_query(), strict=True):
            one = LinearSelfAttention(5).double()
            for weight in one.parameters():
                weight.data.zero_()
            one.key.weight.data = torch.eye(5).double()
            one.query.weight.data[:4, :4] = inner.detach()
            one.value.weight.data[-1, -1] = v.detach()
            one.output.weight.data = torch.eye(5).double() / 7
            summed += one(context, query).detach() - query
        close(layer(context, query).detach(), query + summed)
        if rank == 1:
            assert torch.linalg.matrix_rank(layer.key_query()).tolist() == [1, 1, 1]

    def test_merged_heads_are_an_mlp_on_cubic_features(self):
        layer, (context, query, target) = heads(), prompts(9, 7, SIGMA)
        network = cubic_mlp(layer)
        z = cubic_features(context, query)
        by_hand = np.stack(
            [
                np.outer(c[:, :4].T @ c[:, 4] / 7, q[:4]).ravel()
                for c, q in zip(context.numpy(), query.numpy(), strict=True)
            ]
        )
        close(z, by_hand)
        output = network(z)[:, 0]
        close(output.detach(), layer(context, query)[:, -1].detach())
        # The gradients are the same as well, so every step of training is.
        of_network = torch.autograd.grad((output - target).square().mean(), list(network.parameters()))
        of_layer = torch.autograd.grad(
            (layer(context, query)[:, -1] - target).square().mean(), [layer.scores, layer.corner]
        )
        close(of_network[0], of_layer[0].flatten(1))
        close(of_network[1][0], of_layer[1])
        reversed_features = cubic_features(context.flip(-2), query.roll(1, 0))  # the control: another query's
        assert (network(reversed_features)[:, 0] - output).abs().max() > 1e-3
        with pytest.raises(ValueError, match="layer has rank=1, separate keys and queries"):
            cubic_mlp(heads(rank=1))

    @pytest.mark.parametrize("rank", [None, 1])
    def test_the_loss_by_moments_is_the_loss_of_the_layer(self, rank):
        layer, (context, query, target) = heads(rank), prompts(50, 7, SIGMA)
        direct = (layer(context, query)[:, -1] - target).square().mean()
        by_moments = loss_on(context, query, target)(layer.matrix())
        close(by_moments.detach(), direct.detach())
        parameters = list(layer.parameters())
        for one, other in zip(
            torch.autograd.grad(by_moments, parameters), torch.autograd.grad(direct, parameters), strict=True
        ):
            close(one, other)


class TestMerged:
    def test_merged_time_course(self):
        """The flow of one head's two numbers, v and u with U = u I / √D, by the method of Runge and Kutta."""
        features, examples, strength, width = 3, 8, 0.01, 1e-3
        state, path = np.full(2, strength**0.5), [strength / 3**0.5]

        def speed(state):
            v, u = state
            curvature = 1 + (1 + features) / examples
            return 3**0.5 * (1 - curvature * v * u / 3**0.5) * np.array([u, v])

        for _ in range(3000):
            a = speed(state)
            b = speed(state + width / 2 * a)
            c = speed(state + width / 2 * b)
            state = state + width / 6 * (a + 2 * b + 2 * c + speed(state + width * c))
            path.append(state.prod() / 3**0.5)
        times = width * torch.arange(3001).double()
        np.testing.assert_allclose(merged_time_course(times, features, examples, strength), path, rtol=1e-9)
        derived = symbolic.merged_time_course().lambdify()
        sizes = np.array(float(features)), np.array(float(examples)), np.array(strength**0.5)
        close(
            merged_time_course(times[:5], features, examples, strength), [derived(t, *sizes) for t in times[:5].numpy()]
        )
        assert path[-1] == pytest.approx(one_layer_optimum(torch.eye(3).double(), examples)[0, 0].item(), rel=1e-2)

    def test_training_follows_it(self):
        white, examples = torch.eye(4).double(), 31

        def loss(matrix):
            return one_layer_loss(matrix, white, examples)

        layer = LinearHeads(features=4, heads=6, scale=1e-2, seed=1).double()
        strength = initial_strength(layer)
        times, found = zip(*((t, M.trace() / 4) for t, M in descend(layer, loss, 4e-3, 700)), strict=True)
        predicted = merged_time_course(torch.tensor(times, dtype=torch.float64), 4, examples, strength)
        of_predicted = loss(predicted[:, None, None] * white)
        fallen = (of_predicted[0] - of_predicted) / (of_predicted[0] - of_predicted[-1])
        drop = (fallen > 0.05) & (fallen < 0.95)
        assert drop.sum() > 100
        assert (torch.stack(found) / predicted - 1).abs()[drop].max() < 0.05
        other = merged_time_course(torch.tensor(times, dtype=torch.float64), 4, examples, 2 * strength)  # the control
        assert (torch.stack(found) / other - 1).abs()[drop].max() > 0.2


class TestSeparate:
    def test_plateau_losses(self):
        sigma, examples = SIGMA + 0.05, 9
        _, vectors = torch.linalg.eigh(sigma)
        best = one_layer_optimum(sigma, examples)
        levels = plateau_losses(sigma, examples)
        for m in range(5):
            kept = vectors[:, 4 - m :]
            close(levels[m], one_layer_loss(kept @ kept.T @ best @ kept @ kept.T, sigma, examples))
        assert (levels.diff() < 0).all()
        assert levels[-1] > 0

    @pytest.mark.slow
    def test_training_pauses_there(self):
        """Four heads of rank one, D = 4, from small numbers: the loss at each pause within 5 % of its plateau."""

        def loss(matrix):
            return one_layer_loss(matrix, SIGMA, 31)

        layer = LinearHeads(features=4, heads=4, rank=1, scale=0.03, seed=2).double()
        losses = torch.stack([loss(M) for _, M in list(descend(layer, loss, 1.0, 6000))[::20]])
        levels = plateau_losses(SIGMA, 31)
        before_the_end = losses[losses > 1.02 * levels[-1]]
        found = before_the_end[pauses(before_the_end)]
        assert len(found) == 3
        np.testing.assert_allclose(found, levels[1:-1], rtol=0.05)
        white = plateau_losses(torch.eye(4).double() / 4, 31)  # the control: other inputs with the same trace
        assert (found / white[1:-1] - 1).abs().max() > 0.05


def test_errors():
    for bad, match in (
        (lambda: LinearHeads(0, 1), "features is 0"),
        (lambda: LinearHeads(2, 1, rank=0), "rank is 0"),
        (lambda: merged_time_course(torch.zeros(2), 2, 3, 0.0), "strength is 0.0: give a positive number"),
        (lambda: plateau_losses(-SIGMA, 3), "covariance is not symmetric and positive definite"),
        (lambda: plateau_losses(SIGMA, 0), "examples is 0"),
        (lambda: next(descend(heads(), lambda M: M.sum(), 0.1, 0)), "steps is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
