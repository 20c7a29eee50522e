"""One edit made from several questions: against NumPy, against the exact joint edit, and where it must not work."""

import numpy as np
import pytest
import torch
from cases import relative
from language import same, shared, state

from icl_lib import absorb
from icl_lib.paper import plots
from icl_lib.paper.experiments import edited_for_questions

LENGTH = 4


def draw(rows):
    """Examples of 12 tokens, and questions of four."""
    return torch.randint(97, (12,)), torch.stack([torch.randperm(97)[:LENGTH] for _ in range(rows)])


def alone(questions, context=12):
    positions = torch.arange(context, context + LENGTH).expand(len(questions), -1)
    return {"input_ids": questions, "position_ids": positions}


def test_without_ridge_one_question_has_the_exact_joint_edit():
    model = shared("Llama")
    examples, questions = draw(1)
    before = state(model)
    ids = torch.cat([examples[None], questions], 1)
    exact = absorb(model, ids, 12, joint=True).merged(model)
    small, large = (edited_for_questions(model, examples, questions, ridge) for ridge in (1e-10, 1e-2))
    wanted = model(ids).logits[:, -LENGTH:]
    answers = [relative(one(**alone(questions)).logits, wanted) for one in (exact, small, large, model)]
    assert answers[0] < 1e-12
    assert answers[1] < 1e-6
    assert answers[1] < answers[2] / 100 < answers[3] / 100
    for ours, theirs in zip(small.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # the ridge over the smallest eigenvalue
    assert same(before, state(model))


def test_the_first_block_against_numpy():
    """Ridge regression as least squares with √(μs) I below the data, in a map whose input no edit has changed."""
    model, ridge = shared("Llama"), 0.3
    examples, questions = draw(12)
    reads = {}
    for name, call in (("with", {"input_ids": torch.cat([examples.expand(12, -1), questions], 1)}), ("bare", {})):
        hook = model.model.layers[0].post_attention_layernorm.register_forward_hook(
            lambda _, __, output, name=name: reads.update({name: output[:, -LENGTH:].flatten(0, 1).numpy()})
        )
        model(**(call or alone(questions)))
        hook.remove()
    weight = model.model.layers[0].mlp.up_proj.weight.numpy()
    gram = reads["bare"].T @ reads["bare"]
    rows = np.vstack([reads["bare"], np.sqrt(ridge * np.trace(gram) / 32) * np.eye(32)])
    changes = np.vstack([(reads["with"] - reads["bare"]) @ weight.T, np.zeros((32, 64))])
    expected = np.linalg.lstsq(rows, changes, rcond=None)[0].T
    found = edited_for_questions(model, examples, questions, ridge).model.layers[0].mlp.up_proj.weight.numpy() - weight
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert np.abs(expected).max() > 1e-3


def test_other_examples_give_another_edit():
    model = shared("Llama")
    examples, questions = draw(1)
    other, _ = draw(1)
    wanted = model(torch.cat([examples[None], questions], 1)).logits[:, -LENGTH:]
    own, others = (edited_for_questions(model, one, questions)(**alone(questions)).logits for one in (examples, other))
    assert relative(own, wanted) < relative(others, wanted) / 2


def test_hooks_are_removed_if_the_model_fails():
    model = shared("Llama")
    before = state(model)
    with pytest.raises(IndexError):
        edited_for_questions(model, torch.tensor([5]), torch.tensor([[97]]))
    assert same(before, state(model))


def test_pictures_of_edits_can_share_a_colour_scale():
    small, large = {"inner": [[0.0, 1.0]]}, {"inner": [[0.0, 3.0]]}

    def draw(sizes, **scale):
        return plots.written(sizes, ["2", "+"], "edits", **scale).svg

    assert draw(large, largest={"inner": 3.0}) == draw(large)  # its own scale is the shared one
    assert draw(small, largest={"inner": 3.0}) != draw(small)
