"""The figures' data: the identity holds at every step of training, and the controls do not."""

import pytest
import torch

from icl_lib import implicit_update, plots
from icl_lib.experiments import ONE_BLOCK, run_edited, small_language_model, training_curves
from icl_lib.measures import relative_error
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
    assert relative_error(by_model, by_block).max() < 1e-12
    assert relative_error(by_model, model(prompts.sequence)[:, -1]).max() < 1e-12
    assert relative_error(run_edited(model, 0.5 * update.weight, prompts.sequence[:, -1:]), by_block).max() > 1e-6


def test_small_language_models_follow_their_seed_and_options():
    before = torch.get_rng_state()
    first, again, other = (small_language_model("Llama", blocks=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.model.layers[1].mlp.down_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert len(small_language_model("GPT-2", blocks=3, n_embd=16).transformer.h) == 3
    assert small_language_model("GPT-2", torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="name is 'Lama': choose one of GPT-2, OPT"):
        small_language_model("Lama")
    with pytest.raises(ValueError, match="blocks is 0"):
        small_language_model("Llama", blocks=0)


def test_where_a_prompt_writes_is_said_in_words():
    picture = plots.written([[0.0, 1.0], [3.0, 0.5]], ["2", "+"], "edits")
    assert picture.alt.endswith("The largest, 3, is in block 2 at token 1, '2'.")
