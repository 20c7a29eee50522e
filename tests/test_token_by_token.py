"""The data of the token-by-token figures against plain loops, and the texts of the pictures."""

import numpy as np
import pytest
import torch

from icl_lib import ContextualBlock, SoftmaxAttention, Transformer, implicit_update
from icl_lib.dynamics import normalised_lms, trajectory
from icl_lib.paper import plots
from icl_lib.paper.experiments import (
    ONE_BLOCK,
    compare_with_sgd,
    decay_exponent,
    estimate,
    ranks_from_left,
    read_token_by_token,
    recurrent_block,
    token_by_token,
)
from icl_lib.paper.regression import TrainingSettings, sample_prompts, train

PROMPTS = sample_prompts(count=6, examples=9, features=2, seed=1)


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(0)
    return {
        "attention": Transformer(ONE_BLOCK).double().requires_grad_(False).contextual_block(),
        "GRU": recurrent_block().double().requires_grad_(False),
    }


def test_estimate_is_the_mean_and_its_standard_error():
    values = torch.randn(50, 7, dtype=torch.float64)
    mean, error = estimate(values)
    np.testing.assert_allclose(mean, values.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(error, values.numpy().std(0, ddof=1) / 50**0.5, rtol=1e-12)
    values[3, 2] = torch.nan
    again = estimate(values)
    np.testing.assert_allclose(again.mean[2], np.delete(values.numpy()[:, 2], 3).mean(), rtol=1e-12)
    with pytest.raises(ValueError, match="two finite entries or more"):
        estimate(values[:1])
    with pytest.raises(ValueError, match="norms has 2 tokens: a line from token 2 on needs 3 or more"):
        decay_exponent(torch.rand(5, 2))


def test_decay_exponent_against_polyfit():
    norms = torch.rand(5, 30, dtype=torch.float64) + 0.1
    slopes = [np.polyfit(np.log(np.arange(2, 31)), np.log(one[1:]), 1)[0] for one in norms.numpy()]
    found = decay_exponent(norms)
    assert found.mean == pytest.approx(np.mean(slopes), rel=1e-10)
    assert found.error == pytest.approx(np.std(slopes, ddof=1) / 5**0.5, rel=1e-10)


@pytest.mark.parametrize("name", ["attention", "GRU"])
def test_a_reading_against_edited_weights_prompt_by_prompt(blocks, name, monkeypatch):
    monkeypatch.setattr(token_by_token, "PROMPTS_AT_ONCE", 4)  # two parts of the six prompts
    block = blocks[name]
    reading = read_token_by_token(block, PROMPTS)
    norms, losses, towards, ceilings = np.zeros((6, 9)), np.zeros((6, 10)), np.zeros((6, 9)), np.zeros((6, 9))
    factors = torch.zeros(2, 6, 9, 128, dtype=torch.float64)  # left factors of steps and gradients
    for k in range(6):
        context, query, target = PROMPTS.context[k], PROMPTS.query[k], PROMPTS.target[k]
        weights = [block.first_linear.weight]
        for i in range(1, 10):
            weights.append(weights[0] + implicit_update(block, context[:i], query).weight.dense())
            norms[k, i - 1] = (weights[-1] - weights[-2]).norm()
        for i in range(10):
            losses[k, i] = (block(context[:i], query)[-1] - target).square()
        for i in range(9):
            at = weights[i].clone().requires_grad_()
            name = f"mlp.{block._first}.weight"
            output = torch.func.functional_call(block, {name: at}, (context[:0], query))
            (gradient,) = torch.autograd.grad((output[-1] - target).square(), at)
            step = weights[i + 1] - weights[i]
            question = context[i] * torch.tensor([1.0, 1.0, 0.0])
            here, there = (block.read(context[:0], token) for token in (query, question))
            ceilings[k, i] = abs(here @ there) / here.norm() / there.norm()
            towards[k, i] = -(gradient * step).sum() / gradient.norm() / step.norm()
            factors[0, k, i], factors[1, k, i] = step @ here, gradient @ here
    np.testing.assert_allclose(reading.norms.mean, norms.mean(0), rtol=1e-10)
    np.testing.assert_allclose(reading.loss.mean, losses.mean(0), rtol=1e-10)
    found = reading.towards_answer
    np.testing.assert_allclose(found.by_token.mean, towards.mean(0), rtol=1e-8, atol=1e-12)
    assert found.mean.mean == pytest.approx(towards.mean(), rel=1e-8)
    assert found.mean.error == pytest.approx(towards.mean(1).std(ddof=1) / 6**0.5, rel=1e-8)
    assert (found.size, found.positive, found.ceiling) == pytest.approx((abs(towards).mean(), (towards > 0).mean(), 1))
    steps, slopes = factors / factors.norm(dim=-1, keepdim=True)
    control = -(steps * slopes[[5, 0, 1, 2, 3, 4]]).sum(-1).numpy()
    np.testing.assert_allclose(found.other.by_token.mean, control.mean(0), rtol=1e-8, atol=1e-12)
    assert not np.allclose(control, towards, atol=1e-3)
    assert found.other.other is None
    assert reading.towards_example.other.ceiling == reading.towards_example.ceiling
    pairs = torch.einsum("ad,bd->ab", *2 * [steps.flatten(0, 1)]).square()
    assert reading.dimensions == pytest.approx(1 / pairs.mean().item(), rel=1e-8)
    assert reading.exact < 1e-12
    assert not np.allclose(reading.towards_example.by_token.mean, found.by_token.mean, rtol=1e-2)
    assert reading.towards_example.size <= reading.towards_example.ceiling == pytest.approx(ceilings.mean(), rel=1e-8)
    assert (reading.agreement is None) == (block is blocks["GRU"])
    if reading.agreement is not None:
        assert reading.agreement < 1e-11
        lms = normalised_lms(trajectory(block, PROMPTS.context, PROMPTS.query))
        assert reading.fell == pytest.approx(np.mean(lms.after.numpy() < lms.before.numpy()))
        assert 0 < reading.fell < 1
        np.testing.assert_allclose(reading.predicted.mean, norms.mean(0), rtol=1e-10)


def test_after_training_the_loss_falls_and_the_steps_turn_towards_the_task():
    """A short training run, with another prompt's gradients as the control; a GRU trains too."""
    settings = TrainingSettings(steps=150, batch=64, examples=20, learning_rate=1e-2)
    prompts = sample_prompts(count=100, examples=20, features=2, seed=2)
    torch.manual_seed(0)
    before = read_token_by_token(Transformer(ONE_BLOCK).double().contextual_block(), prompts)
    model = train(lambda: Transformer(ONE_BLOCK), settings, dtype=torch.float32, progress=False).double()
    after = read_token_by_token(model.contextual_block(), prompts)
    assert after.loss.mean[-1] < 0.5 * before.loss.mean[-1]
    assert after.towards_example.mean.mean > 0.05 > abs(before.towards_example.mean.mean)
    assert abs(after.towards_example.other.mean.mean) < 0.02
    assert after.towards_example.other.size > 0.8 * after.towards_example.size, "the size of a cosine says nothing"
    assert isinstance(train(recurrent_block, TrainingSettings(steps=2, examples=5), progress=False), ContextualBlock)


def test_compare_with_sgd_and_ranks(blocks):
    compared = compare_with_sgd(blocks["attention"], PROMPTS, [1e-9, 0.05])
    still, moving = compared[1e-9].loss.mean, compared[0.05].loss.mean
    assert still.shape == moving.shape == (10,)
    np.testing.assert_allclose(still, still[0], rtol=1e-6)  # such steps are too small to see
    assert not np.allclose(moving, still, rtol=1e-3)
    assert abs(compared[0.05].cosine.mean) <= compared[0.05].ceiling.mean < 1
    assert abs(compared[0.05].other.mean - compared[0.05].cosine.mean) > 1e-3
    ranks = ranks_from_left(blocks["attention"], PROMPTS)
    assert ranks.mean.tolist() == list(range(10))


def test_pictures_say_what_was_measured(blocks):
    reading = {"first": read_token_by_token(blocks["attention"], PROMPTS)}
    reading["second"] = read_token_by_token(blocks["attention"], sample_prompts(6, 9, 2, seed=3))
    norms = plots.increments(reading, "second", "steps")
    assert f"first from {reading['first'].norms.mean[0]:.2g} to" in norms.alt
    assert "predicted" in norms.svg
    assert "predicted" not in plots.increments({"GRU": read_token_by_token(blocks["GRU"], PROMPTS)}, "", "steps").svg
    cosines = {name: one.towards_example for name, one in reading.items()}
    assert (
        f"second {cosines['second'].mean}. The upper bound is" in plots.step_cosines(cosines, ["second"], "cosines").alt
    )
    sgd = compare_with_sgd(blocks["attention"], PROMPTS, [0.05])
    assert f"SGD at rate 0.05: {sgd[0.05].loss.mean[-1]:.2g}" in plots.learning(reading["first"], sgd, "learning").alt
    row = plots.scrubbed(2, np.ones((4, 3)), np.zeros((4, 3)), 0.25, [0.0, 0.5, 1.0], 0.8, 1.0, (0.0, 1.0))
    assert "the prediction is 1.000; the target is 0.800" in row.pictures[1].alt
    falling = plots.invented_losses([1.0, 2.0], [0.0, 3.0], "losses")
    assert "it falls in 50% of 2 steps" in falling.alt


def test_a_block_with_a_skip_connection_is_followed_exactly():
    torch.manual_seed(0)
    block = ContextualBlock(SoftmaxAttention(3), torch.nn.Linear(3, 3), skip=True).double()
    assert read_token_by_token(block, PROMPTS).exact < 1e-12


def test_prompts_in_another_order():
    again = PROMPTS.in_order(torch.tensor([2, 0, 1, 3, 4, 5, 6, 7, 8]))
    torch.testing.assert_close(again.context[:, 0], PROMPTS.context[:, 2], rtol=0, atol=0)
    torch.testing.assert_close(again.query, PROMPTS.query, rtol=0, atol=0)
    assert bool((again.questions[..., -1] == 0).all())
    assert bool((PROMPTS.context[..., -1] != 0).any()), "the prompts themselves keep their answers"


def test_one_head_is_one_rate():
    torch.manual_seed(0)
    block = ContextualBlock(SoftmaxAttention(3), torch.nn.Linear(3, 3)).double()
    reading = read_token_by_token(block, PROMPTS)
    assert reading.lms_after.mean[-1] < reading.lms_before.mean[-1]
    assert reading.fell == 1  # with several heads it is not
