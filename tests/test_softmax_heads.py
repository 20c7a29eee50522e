"""Heads of softmax attention on noisy regression: against plain NumPy and Monte Carlo, with controls."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import relative

from icl_lib import symbolic
from icl_lib.constructions import (
    SoftmaxHeads,
    debiased_descent,
    descent_loss,
    head_patterns,
    noisy_prompts,
    opposed_heads,
    train_softmax_heads,
)
from icl_lib.paper.experiments import HeadSettings, head_settings, write_softmax_heads


def prompts(count=200, examples=12, features=3, noise=0.1, seed=0):
    return noisy_prompts(count, examples, features, noise, torch.Generator().manual_seed(seed))


def descended(context, query, rate, centred):
    """One step of gradient descent from zero on the mean squared error, prompt by prompt, in NumPy."""
    found = []
    for tokens, asked in zip(context.numpy(), query.numpy(), strict=True):
        x, y = tokens[:, :-1], tokens[:, -1]
        if centred:
            x, y = x - x.mean(0), y - y.mean()
        found.append(rate * (x.T @ y / len(x)) @ asked[:-1])
    return np.array(found)


class TestSoftmaxHeads:
    def test_the_formula(self):
        torch.manual_seed(0)
        layer = SoftmaxHeads(dim=4, heads=3).double().requires_grad_(False)
        context, query, _ = prompts(count=5)
        wanted = np.zeros(5)
        for b, (tokens, asked) in enumerate(zip(context.numpy(), query.numpy(), strict=True)):
            for K, Q, W, o in zip(*(part.numpy() for part in layer.parameters()), strict=True):
                weights = np.exp(tokens @ K.T @ Q @ asked / math.sqrt(4))
                wanted[b] += o @ W @ (weights @ tokens / weights.sum())
        np.testing.assert_allclose(layer(context, query), wanted, rtol=1e-12)
        np.testing.assert_allclose(layer.by_head(context, query).sum(-1), wanted, rtol=1e-12)

    def test_errors(self):
        layer = SoftmaxHeads(3, 2)
        with pytest.raises(ValueError, match="heads is 0: give a whole number"):
            SoftmaxHeads(3, 0)
        with pytest.raises(ValueError, match="give at least one example"):
            layer(torch.zeros(0, 3), torch.zeros(3))
        with pytest.raises(ValueError, match="this layer reads 3"):
            layer(torch.zeros(5, 4), torch.zeros(4))


class TestDebiasedDescent:
    def test_debiased_descent(self):
        context, query, _ = prompts(count=7)
        found = debiased_descent(context, query, 0.8)
        np.testing.assert_allclose(found, descended(context, query, 0.8, centred=True), rtol=1e-12, atol=1e-14)
        assert relative(found, torch.as_tensor(descended(context, query, 0.8, centred=False))) > 0.01
        derived = symbolic.debiased_descent(12).lambdify()
        x, y, asked = context[0, :, :-1].numpy(), context[0, :, -1].numpy(), query[0, :-1].numpy()
        assert derived(x, y, asked, np.array(0.2), np.array(2.0)) == pytest.approx(found[0].item(), rel=1e-12)

    def test_opposed_heads_descend_up_to_the_third_order(self):
        context, query, _ = prompts(examples=12, features=3)

        def missed(scale, layer):
            return relative(layer(context, query), debiased_descent(context, query, 1.0))

        errors = [missed(scale, opposed_heads(3, scale, 0.5 / scale).double()) for scale in (0.04, 0.02, 0.01)]
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.02)  # ω³ is left out of a prediction of the order ω
        assert errors[1] / errors[2] == pytest.approx(4, rel=0.02)
        assert errors[2] < 1e-3
        one = opposed_heads(3, 0.01, 50.0).double()
        one.output[1] = 0  # one head alone keeps the mean of the targets, times μ
        one.output[0] *= 2
        assert missed(0.01, one) > 10

    def test_softmax_does_not_see_a_shift_of_the_inputs(self):
        context, query, _ = prompts()
        shifted = context + torch.tensor([2.0, -1.0, 3.0, 0.0])
        layer = opposed_heads(3, 0.4, 1.0).double()
        torch.testing.assert_close(layer(shifted, query), layer(context, query), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            debiased_descent(shifted, query, 1.0), debiased_descent(context, query, 1.0), rtol=1e-12, atol=1e-12
        )
        plain = [torch.as_tensor(descended(tokens, query, 1.0, centred=False)) for tokens in (shifted, context)]
        assert relative(*plain) > 0.1

    @pytest.mark.parametrize("debiased", [True, False])
    def test_descent_loss(self, debiased):
        L, d, noise = 8, 3, 0.3
        context, query, target = prompts(200_000, L, d, noise)
        loss, rate = descent_loss(L, d, noise, debiased)
        inputs = context[..., :-1] - (context[..., :-1].mean(-2, keepdim=True) if debiased else 0)
        once = ((inputs @ query[:, :-1, None])[..., 0] * context[..., -1]).mean(-1)
        squares = (rate * once - target).square()
        assert abs(squares.mean() - loss) < 3 * squares.std() / math.sqrt(len(squares))
        assert (once @ target / (once @ once)).item() == pytest.approx(rate, rel=0.02)
        other = descent_loss(L, d, noise, not debiased)[0]
        assert abs(loss - other) > 3 * squares.std() / math.sqrt(len(squares))  # the test can tell them apart

    def test_errors(self):
        with pytest.raises(ValueError, match="scale is 0, so both heads"):
            opposed_heads(2, 0.0, 1.0)
        with pytest.raises(ValueError, match="value is nan"):
            opposed_heads(2, 0.1, math.nan)
        with pytest.raises(ValueError, match="noise is -1: give the variance"):
            descent_loss(4, 2, -1)
        with pytest.raises(ValueError, match="examples is 0"):
            noisy_prompts(1, 0, 2, 0.1, torch.Generator())
        with pytest.raises(ValueError, match="steps is 0"):
            train_softmax_heads(2, 4, 2, steps=0)
        with pytest.raises(ValueError, match="layer is a"):
            head_patterns(torch.nn.Linear(2, 2))


class TestTraining:
    def test_prompts(self):
        context, query, target = prompts(50_000, 4, 3, 0.5)
        x, y = context[..., :-1], context[..., -1]
        assert x.square().mean().item() == pytest.approx(1, abs=0.02)
        assert y.var().item() == pytest.approx(1.5, abs=0.03)  # ‖w‖² has the mean 1
        assert target.var().item() == pytest.approx(1.5, abs=0.03)
        assert not query[:, -1].any()

    def test_patterns_of_random_heads(self):
        torch.manual_seed(0)
        patterns = head_patterns(SoftmaxHeads(6, 50))
        assert patterns.diagonal.mean() < 0.15
        assert patterns.target.mean() == pytest.approx(1 / 6, abs=0.08)

    @pytest.mark.slow
    def test_two_heads_train_to_debiased_descent_and_one_does_not(self):
        context, query, target = prompts(20_000, 20, 3, 0.1, seed=9)
        loss, _ = descent_loss(20, 3, 0.1)
        reached = {}
        for heads in (1, 2):
            layer, start = train_softmax_heads(heads, 20, 3, steps=900)
            reached[heads] = (layer(context, query) - target).square().mean().item()
            assert (start(context, query) - target).square().mean() > 2 * loss
        assert reached[2] < 1.1 * loss
        assert reached[1] > 1.3 * loss
        patterns = head_patterns(layer)
        assert patterns.scales.sum().abs() < 0.05 * patterns.scales.abs().sum()
        assert patterns.values.sum().abs() < 0.05 * patterns.values.abs().sum()
        assert (patterns.scales * patterns.values > 0).all()
        assert min(patterns.diagonal.min(), patterns.target.min()) > 0.98


class TestStoredRuns:
    def test_runs_are_written(self, tmp_path):
        small = HeadSettings(examples=4, features=2, steps=3, batch=8)
        settings = [replace(small, heads=heads, seed=seed) for heads in (1, 2) for seed in (0, 1)]
        result = write_softmax_heads(tmp_path / "runs", tmp_path / "heads.json", settings, workers=1, progress=False)
        assert json.loads((tmp_path / "heads.json").read_text()) == result
        assert [run["settings"]["heads"] for run in result["runs"]] == [1, 1, 2, 2]
        assert len(result["runs"][3]["scales"]) == 2
        assert result["runs"][0]["step"] == result["runs"][3]["step"] != result["runs"][0]["loss"]

    def test_every_number_of_heads_has_every_seed(self):
        settings = head_settings(HeadSettings(steps=7), seeds=3)
        assert len(set(settings)) == 9
        assert {one.steps for one in settings} == {7}
        with pytest.raises(ValueError, match="seeds is 0"):
            head_settings(seeds=0)
