"""The task and its training."""

import pytest
import torch

from icl_lib.blocks.transformer import Transformer
from icl_lib.paper.experiments import ONE_BLOCK
from icl_lib.paper.regression import TrainingSettings, mean_squared_error, prediction, sample_prompts, train

SMALL = TrainingSettings(steps=150, batch=64, examples=20, every=50)


def build():
    return Transformer(ONE_BLOCK)


def test_prompts_are_linear_regression():
    prompts = sample_prompts(2000, examples=7, features=3, seed=0)
    inputs, outputs = prompts.context[..., :3], prompts.context[..., 3]
    torch.testing.assert_close(outputs, torch.einsum("pnd,pd->pn", inputs, prompts.task), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(prompts.target, (prompts.query[:, :3] * prompts.task).sum(-1), rtol=1e-12, atol=1e-13)
    assert (prompts.query[:, 3] == 0).all()  # the answer is not in the prompt
    for standard_normal in (inputs, prompts.task):
        assert abs(standard_normal.mean()) < 0.05
        assert abs(standard_normal.std() - 1) < 0.05


def test_prompts_follow_their_seed():
    first, again, other = (sample_prompts(3, 4, 2, seed).sequence for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert torch.equal(sample_prompts(3, 4, 2, 0, dtype=torch.float32).sequence, first.float())


def test_loss():
    prompts = sample_prompts(5, 4, 2, seed=0)
    output = torch.zeros(5, 3).double()
    output[:, -1] = prompts.target + 2
    assert torch.equal(prediction(output), output[:, 2])
    torch.testing.assert_close(mean_squared_error(output, prompts), torch.tensor(4.0).double())


@pytest.mark.slow
def test_training_learns_and_repeats_itself():
    state = torch.random.get_rng_state()
    losses = []
    model = train(build, SMALL, lambda step, loss, _: losses.append((step, loss)), progress=False)
    assert [step for step, _ in losses] == [0, 50, 100, 150]
    again = train(build, SMALL, progress=False)
    other = train(build, TrainingSettings(**{**vars(SMALL), "seed": 1}), progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is untouched
    prompts = sample_prompts(200, 20, 2, seed=9)
    trained, repeated, reseeded = (net(prompts.sequence)[:, -1] for net in (model, again, other))
    assert torch.equal(trained, repeated)
    assert not torch.allclose(trained, reseeded)
    with torch.random.fork_rng():
        torch.manual_seed(SMALL.seed)
        untrained = build().double()
    before = mean_squared_error(untrained(prompts.sequence)[:, -1], prompts)
    assert mean_squared_error(trained, prompts) < before / 3
    # The examples did it: with those of another task the answers are wrong.
    mixed = torch.cat([prompts.context.roll(1, 0), prompts.sequence[:, -1:]], dim=1)
    assert mean_squared_error(model(mixed)[:, -1], prompts) > before / 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"every": -1}, "every is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises((ValueError, TypeError), match=says):
        TrainingSettings(**settings)


@pytest.mark.parametrize("steps", range(1, 13))
def test_any_number_of_steps(steps):
    seen = []
    settings = TrainingSettings(steps=steps, batch=2, examples=3, every=5)
    train(build, settings, lambda step, *_: seen.append(step), progress=False)
    assert seen[0] == 0
    assert seen[-1] == steps


def test_a_training_that_diverges_says_so():
    with pytest.raises(ValueError, match=r"the (loss|gradient) is not finite at step \d+: lower learning_rate"):
        train(build, TrainingSettings(steps=9, batch=4, examples=5, learning_rate=1e300), progress=False)


@pytest.mark.parametrize(
    ("arguments", "says"), [((-1, 3, 2), "count is -1"), ((2, -1, 2), "examples is -1"), ((2, 3, 0), "features")]
)
def test_prompt_sizes_are_checked(arguments, says):
    with pytest.raises(ValueError, match=says):
        sample_prompts(*arguments, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_keeps_the_dtype(dtype):
    settings = TrainingSettings(steps=1, batch=2, examples=3)
    assert train(build, settings, dtype=dtype, progress=False).embed.weight.dtype == dtype
