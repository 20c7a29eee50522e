"""The experiments: the identity holds at every step of training, and the controls fail."""

import pytest
import torch
from torch import nn

from icl_lib import ContextualBlock, MeanPooling, implicit_update
from icl_lib.blocks.transformer import Transformer
from icl_lib.measures import relative_error, scientific
from icl_lib.paper import plots
from icl_lib.paper.experiments import (
    ONE_BLOCK,
    run_edited,
    small_language_model,
    smaller_edits,
    training_curves,
    with_other_tail,
)
from icl_lib.paper.regression import TrainingSettings, sample_prompts


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


@pytest.mark.parametrize("steps", [0, 100])
def test_smaller_edits_keep_one_output_and_the_formula_keeps_all(steps):
    model = Transformer(ONE_BLOCK).double()
    if steps:
        settings = TrainingSettings(steps=steps, batch=32, examples=20, every=50)
        _, model = training_curves(settings, validation_prompts=2, progress=False)
    prompts = sample_prompts(20, 20, 2, seed=1)
    block, bare = model.contextual_block(), prompts.sequence[:, -1:]
    formula = implicit_update(block, prompts.context, prompts.query).weight
    smaller = smaller_edits(block, prompts.context, prompts.query)
    assert smaller.rank().tolist() == [1] * 20
    assert (smaller.norm() < 0.99 * formula.norm()).all()

    prompted = model(prompts.sequence)[:, -1]
    assert relative_error(run_edited(model, smaller, bare), prompted).max() < 1e-12
    assert relative_error(run_edited(model, 0.9 * smaller, bare), prompted).min() > 1e-6  # negative control

    other = with_other_tail(model, seed=1)
    prompted = other(prompts.sequence)[:, -1]
    assert relative_error(run_edited(other, formula, bare), prompted).max() < 1e-12
    assert relative_error(run_edited(other, smaller, bare), prompted).min() > 1e-4


@pytest.mark.parametrize("batch", [(), (3,), (2, 2)])
def test_smaller_edits_of_a_linear_tail_are_a_projection(batch):
    mlp = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 2)).double()
    block = ContextualBlock(MeanPooling(), mlp)
    context, query = torch.randn(*batch, 5, 4).double(), torch.randn(*batch, 4).double()
    formula = implicit_update(block, context, query).weight
    projection = torch.linalg.pinv(mlp[1].weight) @ mlp[1].weight
    smaller = smaller_edits(block, context, query)
    torch.testing.assert_close(smaller.dense(), projection @ formula.dense(), rtol=1e-10, atol=1e-13)
    assert not torch.allclose(smaller.dense(), formula.dense(), rtol=1e-3)  # negative control
    # Nothing is gained where the tail loses nothing.
    whole = ContextualBlock(MeanPooling(), mlp[0])
    torch.testing.assert_close(smaller_edits(whole, context, query).dense(), formula.dense(), rtol=1e-10, atol=1e-13)


def test_smaller_edits_check_their_input():
    block, prompts = Transformer(ONE_BLOCK).double().contextual_block(), sample_prompts(2, 5, 2, seed=0)
    with pytest.raises(ValueError, match="context is empty"):
        smaller_edits(block, prompts.context[:, :0], prompts.query)
    with pytest.raises(ValueError, match="block is a Linear"):
        smaller_edits(nn.Linear(3, 3), prompts.context, prompts.query)
    with pytest.raises(ValueError, match="iterations is 0"):
        smaller_edits(block, prompts.context, prompts.query, iterations=0)
    with pytest.raises(ValueError, match="single contextual block"):
        with_other_tail(Transformer(ONE_BLOCK.__class__(dim=3, blocks=2)))


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


def test_a_picture_of_the_solution_set_says_what_it_shows():
    row = plots.solution_family([-1.0, 0.0], [2.0, 1.0], [torch.eye(2).double().numpy()] * 2, 3e-16, 1, at=1)
    norms, edit = row.pictures
    assert "t is 0 and the norm 1.00" in norms.alt
    assert "rank is 1" in edit.alt
    assert scientific(3e-16) in edit.alt


def test_pictures_of_a_removal_share_their_axes():
    arguments = ([0, 1], [1.0, 0.0], 0.5, [0.5, 0.5], [0.1, 0.5], 0.4)
    shared, own = (plots.removal(*arguments, at=0, limits=limits) for limits in ((9.0, (-7.0, 7.0)), None))
    assert "norm 1.00" in shared.pictures[0].alt
    assert shared._repr_html_() != own._repr_html_()


@pytest.mark.parametrize(("limits", "outside"), [((9.0, (0.0, 0.6)), False), ((9.0, (0.0, 0.3)), True), (None, False)])
def test_a_right_answer_outside_the_axes_is_named_in_the_legend(limits, outside):
    row = plots.removal([0, 1], [1.0, 0.0], 0.2, [0.2, 0.2], [0.1, 0.2], 0.4, at=0, limits=limits)
    assert ("right answer, 0.40: outside" in row.pictures[1].svg) == outside


def test_where_a_prompt_writes_is_said_in_words():
    picture = plots.written({"inner": [[0.0, 1.0], [3.0, 0.5]], "outer": [[0.0, 1.0]]}, ["2", "+"], "2(a+b)")
    assert "The largest of the inner edits, 3, is in block 2 at token 1, '2'." in picture.alt
    assert picture.alt.endswith("The largest of the outer edits, 1, is in block 1 at token 2, '+'.")
