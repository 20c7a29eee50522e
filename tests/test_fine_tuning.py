"""SGD on a prompt's examples, against torch.optim.SGD on a copy of the block for each prompt."""

import copy

import pytest
import torch
from cases import block_of
from torch import nn

from icl_lib import GRU, SoftmaxAttention
from icl_lib.paper.fine_tuning import fine_tune, fine_tuned_losses
from icl_lib.paper.regression import sample_prompts

PROMPTS = sample_prompts(count=3, examples=12, features=2, seed=0)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("layer", [lambda: SoftmaxAttention(3), lambda: GRU(3, 3)])
def test_it_is_sgd_on_the_first_linear_map(layer, skip):
    block, rate = block_of(layer(), 3, skip), 0.05
    before = copy.deepcopy(block.state_dict())
    steps = fine_tune(block, PROMPTS, rate)
    losses = fine_tuned_losses(block, PROMPTS, steps)
    for k in range(3):
        trained, answer = copy.deepcopy(block), PROMPTS.target[k]
        optimiser = torch.optim.SGD([trained.first_linear.weight], lr=rate)

        def loss(token, answer, trained=trained):
            return (trained(token[None][:0], token)[-1] - answer).square()

        torch.testing.assert_close(losses[k, 0], loss(PROMPTS.query[k], answer).detach(), rtol=1e-12, atol=1e-13)
        for i in range(12):
            optimiser.zero_grad()
            example = PROMPTS.context[k, i]
            loss(example * torch.tensor([1.0, 1.0, 0.0]).double(), example[-1]).backward()
            optimiser.step()
            weight = block.first_linear.weight + steps.first(i + 1)[k].dense()
            torch.testing.assert_close(weight, trained.first_linear.weight, rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(
                losses[k, i + 1], loss(PROMPTS.query[k], answer).detach(), rtol=1e-12, atol=1e-13
            )
    assert losses[:, -1].mean() < losses[:, 0].mean()
    assert not torch.allclose(losses[:, -1], losses[:, 0], rtol=1e-3)  # negative control
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_a_rate_of_zero_changes_nothing():
    block = block_of(SoftmaxAttention(3), 3)
    steps = fine_tune(block, PROMPTS, 0)
    assert bool((steps.norm() == 0).all())
    losses = fine_tuned_losses(block, PROMPTS, steps)
    torch.testing.assert_close(losses, losses[:, :1].expand_as(losses), rtol=0, atol=0)


def test_wrong_input():
    block = block_of(SoftmaxAttention(3), 3)
    with pytest.raises(ValueError, match="block is a Linear: give a ContextualBlock"):
        fine_tune(nn.Linear(3, 3), PROMPTS, 0.01)
    with pytest.raises(ValueError, match="prompts is a Tensor: give what sample_prompts returns"):
        fine_tune(block, PROMPTS.sequence, 0.01)
    with pytest.raises(ValueError, match="prompts hold no examples"):
        fine_tune(block, sample_prompts(3, 0, 2, seed=0), 0.01)
    for rate in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="learning_rate is"):
            fine_tune(block, PROMPTS, rate)
