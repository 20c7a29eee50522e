"""The figures' data: the identity holds at every step of training, and the controls do not."""

import pytest
import torch

from icl_lib import implicit_update
from icl_lib.experiments import ONE_BLOCK, relative_difference, run_edited, training_curves
from icl_lib.regression import TrainingSettings, sample_prompts
from icl_lib.transformer import Transformer


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_training_curves(dtype, bound):
    settings = TrainingSettings(steps=100, batch=32, examples=20, every=50)
    curves, model = training_curves(settings, validation_prompts=50, dtype=dtype, progress=False)
    assert curves.step == [0, 50, 100]
    assert curves.prompted[-1] < curves.prompted[0] / 2
    assert max(curves.difference) <= bound
    assert curves.edited == pytest.approx(curves.prompted, rel=bound)
    for control in (curves.unedited, curves.swapped):  # once trained, the prompt matters
        assert control[-1] > 2 * curves.prompted[-1]
    assert model.config == ONE_BLOCK


def test_the_models_own_forward_agrees_with_the_edited_block():
    model, prompts = Transformer(ONE_BLOCK).double(), sample_prompts(4, 6, 2, seed=0)
    block = model.contextual_block()
    update = implicit_update(block, prompts.context, prompts.query)
    by_model = run_edited(model, update.weight, prompts.sequence[:, -1:])
    by_block = update.apply(block)(prompts.context[:, :0], prompts.query)
    assert relative_difference(by_model, by_block) < 1e-12
    assert relative_difference(by_model, model(prompts.sequence)[:, -1]) < 1e-12
    assert relative_difference(run_edited(model, 0.5 * update.weight, prompts.sequence[:, -1:]), by_block) > 1e-6
