"""The measurements of the chapter on learning: new rules, reading by example, some blocks only, and fine-tuning."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from icl_lib import Transformer, absorb
from icl_lib.dynamics import trajectory
from icl_lib.paper import plots
from icl_lib.paper.experiments import (
    ONE_BLOCK,
    edited_for_questions,
    head_matrices,
    lower_next,
    recurrent_block,
    with_initial,
)
from icl_lib.paper.fine_tuning import fine_tune
from icl_lib.paper.hidden_rule import (
    NEW_RULES,
    PAIRS,
    RULES,
    VOCABULARY,
    Prompts,
    Rule,
    fine_tuned,
    gradient_cosines,
    load_hidden_rule,
    measure_cascade,
    measure_edited,
    measure_fine_tuned,
    measure_rules,
    measure_steered,
    nearest_answers,
    of_blocks,
    replies,
    sample_of_rules,
    sample_prompts,
)
from icl_lib.paper.hidden_rule.evaluation import _draw
from icl_lib.paper.reading import read_by_example
from icl_lib.paper.regression import sample_prompts as regression_prompts

GRID = [(a, b) for a in range(1, 10) for b in range(1, 10)]
ORACLE = {"3a+b": lambda a, b: a + a + a + b, "a+3b": lambda a, b: a + b + b + b,
          "2|a-b|": lambda a, b: 2 * (max(a, b) - min(a, b)), "max(a,b)": max}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_hidden_rule(dtype=torch.float64)


def test_new_rules_are_new():
    known = {tuple(rule(a, b) for a, b in GRID) for rule in RULES}
    new = [rule for rules in NEW_RULES.values() for rule in rules]
    tables = [tuple(rule(a, b) for a, b in GRID) for rule in new]
    assert len({*known, *tables}) == len(RULES) + len(new)
    for rule, table in zip(new, tables, strict=True):
        assert table == tuple(rule(*PAIRS.T).tolist())
        if rule.form in ORACLE:
            assert table == tuple(ORACLE[rule.form](a, b) + rule.constant for a, b in GRID)


def test_prompts_of_new_rules_and_the_nearest_rules_of_training():
    rules = NEW_RULES["new constants"]
    prompts = sample_of_rules(rules, 50, 3, seed=1)
    given, near = nearest_answers(prompts)
    for index, tokens in enumerate(prompts.tokens):
        text = VOCABULARY.decode(tokens)
        *examples, (a, b) = [tuple(map(int, part.replace("=", "+").strip("+").split("+"))) for part in text.split(", ")]
        rule = rules[prompts.rule[index]]
        assert all(rule(*example[:2]) == example[2] for example in examples)
        assert rule(a, b) == prompts.answer[index] <= 58
        apart = [sum(abs(other(x, y) - z) for x, y, z in examples) for other in RULES]
        assert near[index].tolist() == [one == min(apart) for one in apart]
        assert given[index].tolist() == [other(a, b) for other in RULES]
    with pytest.raises(ValueError, match="examples is 99, but there are pairs for"):
        sample_of_rules(rules, 2, 99, seed=0)


def test_the_model_finds_rules_of_training_only(model):
    known, new = (measure_rules(model, rules, 4, count=500) for rules in (RULES, NEW_RULES["new constants"]))
    assert known["accuracy"] > 0.95
    assert known["nearest"] == pytest.approx(known["accuracy"], abs=0.01)  # the nearest rule is the right one
    assert new["accuracy"] < 0.2
    assert new["nearest"] > 2 * new["accuracy"]
    assert 0.03 < known["chance"] < 0.15


def test_reading_by_example(model):
    prompts = sample_prompts(3, 3, seed=2)
    found = read_by_example(model, prompts.tokens, prompts.ends)
    torch.testing.assert_close(found.newest[:, 0], found.read[:, 0], rtol=1e-12, atol=0)
    assert (found.read < 1).all()
    assert (found.effective[:, 0] == 1).all()
    assert all((found.effective[:, i] <= i + 1 + 1e-12).all() for i in range(3))

    # By hand, in the first block, where the vector without examples never changes.
    seen = []
    layer = model.model.layers[0]
    hook = layer.post_attention_layernorm.register_forward_hook(lambda _, __, output: seen.append(output[:, -1]))
    for examples in range(4):
        model(torch.cat([prompts.tokens[:, : 6 * examples], prompts.tokens[:, -4:]], dim=1))
    hook.remove()
    bare, *reads = (one.numpy() for one in seen)
    V = layer.mlp.gate_proj.weight.numpy()
    for i, (one, before) in enumerate(zip(reads, [bare, *reads], strict=False)):
        expected = np.linalg.norm((one - before) @ V.T, axis=1) / np.linalg.norm(bare, axis=1)
        np.testing.assert_allclose(found.steps[:, i, 0], expected, rtol=1e-5)  # the norms of a Llama compute in 32 bits


def test_the_edits_of_some_blocks(model):
    prompts = sample_prompts(40, 4, seed=3)
    other = prompts.by((prompts.rule + 7) % len(RULES))
    every, none, first = measure_cascade(model, prompts, other, [range(4), (), (0,)])
    assert every["right"] == 1
    assert none["right"] == none["other"]  # no edit is no edit
    assert max(every["other"], none["right"], first["right"]) < 0.2

    # One prompt, with the edits of the second block added by hand to a copy.
    ids = prompts.tokens[:1]
    patch = absorb(model, ids, prompts.context_length, joint=True)
    by_hand = copy.deepcopy(model)
    for path, edit in patch.blocks[1].edits.items():
        by_hand.model.layers[1].get_submodule(path).weight += edit.dense()
    part = of_blocks(patch, (1,))
    with part.applied(model):
        got = model(**part.bare(ids)).logits
    torch.testing.assert_close(got, by_hand(**patch.bare(ids)).logits, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, model(**patch.bare(ids)).logits, rtol=1e-3, atol=1e-3)


def test_an_edit_of_one_block_is_made_for_that_block(model):
    prompts = sample_prompts(1, 4, seed=4)
    examples, question = prompts.tokens[0, :-4], prompts.tokens[:, -4:]
    wanted = model(prompts.tokens).logits[:, -4:]
    alone = {"input_ids": question, "position_ids": torch.arange(4)[None] + len(examples)}
    last = edited_for_questions(model, examples, question, ridge=1e-12, blocks=[3])
    torch.testing.assert_close(last(**alone).logits, wanted, rtol=1e-6, atol=1e-6)  # the ridge is not quite zero
    assert not torch.allclose(model(**alone).logits, wanted, rtol=1e-2, atol=1e-2)
    for block, (before, after) in enumerate(zip(model.model.layers, last.model.layers, strict=True)):
        assert torch.equal(before.mlp.down_proj.weight, after.mlp.down_proj.weight) == (block != 3)
    shares = measure_edited(load_hidden_rule(), 4, RULES[:2], blocks=[0])
    assert shares["fitted"] < 0.5  # the first block cannot do it alone


def test_fine_tuning_and_its_gradient(model):
    single = load_hidden_rule()
    prompts = sample_prompts(1, 4, seed=5)
    before = [weight.clone() for weight in single.parameters()]
    shown = Prompts(prompts.rule.expand(4), prompts.pair[0, :-1, None])
    tuned = fine_tuned(single, shown.tokens, shown.answer, steps=20, learning_rate=1e-3)
    assert all(torch.equal(*pair) for pair in zip(before, single.parameters(), strict=True))
    assert torch.equal(replies(tuned, shown.tokens), shown.answer)
    assert not torch.equal(replies(single, shown.tokens), shown.answer)
    assert torch.equal(tuned.model.layers[0].self_attn.q_proj.weight, single.model.layers[0].self_attn.q_proj.weight)
    shares = [measure_fine_tuned(single, 20, 1e-3, [Rule("a+b")], distilled) for distilled in (False, True)]
    assert shares[0] < 0.7 < shares[1]  # 46 questions tell more than four examples

    right, control = gradient_cosines(model, prompts, prompts.answer + 1)
    assert right.shape == control.shape == (1, 4)
    assert not torch.allclose(right, control)
    patch = absorb(model, prompts.tokens, prompts.context_length, joint=True)
    edit = {f"model.layers.2.{path}.weight": one.dense() for path, one in patch.blocks[2].edits.items()}
    weights = {name: dict(model.named_parameters())[name].clone().requires_grad_() for name in edit}
    logits = torch.func.functional_call(model, weights, kwargs=patch.bare(prompts.tokens)).logits
    gradients = torch.autograd.grad(cross_entropy(logits[:, -1], prompts.answer), list(weights.values()))
    inner = -sum((one * edit[name]).sum() for name, one in zip(edit, gradients, strict=True))
    sizes = [sum(one.square().sum() for one in part).sqrt() for part in (gradients, edit.values())]
    torch.testing.assert_close(right[0, 2], inner / sizes[0] / sizes[1], rtol=1e-9, atol=1e-12)


def test_steering(model):
    """One rule and one question: the vector of that question restores its answer after the last block."""
    rules = [Rule("2(a+b)")]
    last, first = (measure_steered(model, block, rules=rules) for block in (3, 0))
    assert 0 <= first < 0.3
    prompts, asked = _draw(rules[0], torch.Generator().manual_seed(0))
    ids = prompts.tokens[:46]

    def stream(tokens):  # the input of the last norm, without hooks
        return model.model(tokens, output_hidden_states=True).hidden_states

    def after(block, tokens):
        return stream(tokens)[block + 1][:, -4:]

    vector = (after(2, ids) - after(2, ids[:, -4:])).mean(0)
    moved = after(2, asked.tokens[:, -4:]) + vector
    at = torch.arange(4).expand(len(moved), -1)
    turned = model.model.rotary_emb(moved, at)
    mask = torch.full((4, 4), float("-inf"), dtype=torch.float64).triu(1).expand(len(moved), 1, 4, 4)
    out = model.model.layers[3](moved, attention_mask=mask, position_ids=at, position_embeddings=turned)
    said = model.lm_head(model.model.norm(out))[:, -1].argmax(-1)
    assert measure_steered(model, 2, rules=rules) == (said == asked.answer).double().mean()
    assert last != first


def test_parts_and_heads():
    torch.manual_seed(0)
    trained, initial = Transformer(ONE_BLOCK).double(), Transformer(ONE_BLOCK).double()
    mixed = with_initial(trained, initial, ["value", "output"])
    for name, weight in mixed.named_parameters():
        source = initial if {"value", "output"} & set(name.split(".")) else trained
        assert torch.equal(weight, dict(source.named_parameters())[name]), name
    with pytest.raises(ValueError, match="parts holds 'values', which is in no path"):
        with_initial(trained, initial, ["values"])

    tokens = torch.randn(7, 3).double()
    writes, scores = head_matrices(trained)
    embedded = trained.embed(tokens)
    expected = trained.blocks[0].attention(embedded[:-1], embedded[-1])
    weights = torch.softmax(tokens @ scores @ tokens[-1], dim=-1)
    torch.testing.assert_close(torch.einsum("hn,hwd,nd->w", weights, writes, tokens), expected, rtol=1e-11, atol=1e-12)


def test_which_steps_lower_the_next_loss():
    prompts = regression_prompts(count=5, examples=8, features=2, seed=0)
    block = recurrent_block().double()
    found = lower_next(block, prompts, 0.01)
    assert all(0 <= share <= 1 for share in found.values())
    path = trajectory(block, prompts.context, prompts.query)
    W = path.weight + path.updates.dense()
    gradients = W[:, :-1] - W[:, 1:]  # of the linear losses, up to one positive factor
    fell = (gradients[:, 1:] * (W[:, 1:-1] - W[:, :-2])).sum((-2, -1)) < 0
    assert found["reading"] == pytest.approx(fell.double().mean().item())

    steps = fine_tune(block, prompts, 0.01)
    count = 0
    for p in range(5):
        for i in range(1, 8):
            errors = []
            for taken in (i - 1, i):
                changed = copy.deepcopy(block)
                with torch.no_grad():
                    changed.first_linear.weight += steps.first(taken)[p].dense()
                    output = changed(prompts.context[p, :0], prompts.questions[p, i])[-1]
                errors.append((output - prompts.context[p, i, -1]) ** 2)
            count += bool(errors[1] < errors[0])
    assert found["SGD"] == pytest.approx(count / 35)


def test_the_pictures_say_what_they_show():
    said = plots.answers([3, 5, 7, 9], [3, 5, 8, 12], "a+b", largest=14).alt
    assert said == "a+b: 50% of 4 answers are right; on average they are 1.0 off."
    drawn = plots.bars(["one", "none"], {"right": [0.5, 0.0], "control": [0.25, 0.0]}, "shares", controls=["control"])
    assert drawn.alt == "shares. one: 50% right, 25% control; none: 0% right, 0% control."
    points = {"trained": (torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([0.5, -2.0, 1.0, -0.1]))}
    assert "the signs agree for 75% of 4 prompts" in plots.agreement(points, controls=[]).alt
    heads = plots.head_columns(torch.tensor([[0.1, 0.75], [0.5, 0.2]]), ("x", "y"), "heads", largest=0.75)
    assert "x up to 0.50, y up to 0.75" in heads.alt
    ticks = plots.curves((1, 2, 4), {"a": [1, 2, 3]}, "t", "alt", xscale="log", xticks=(1, 2, 4), xticklabels=(1, 2, 4))
    assert "10^" not in ticks.svg
    assert ticks.alt == "alt"
