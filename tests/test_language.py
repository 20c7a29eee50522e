"""Language models of every architecture: edits against the model's own forward pass on the whole prompt."""

import copy
import itertools
import subprocess
import sys

import accelerate
import pytest
import torch
import transformers
from cases import relative
from language import LENGTH, MIXTURES, prompts, same, shared, state

from icl_lib import Patch, absorb, greedy_agreement, verify
from icl_lib.models.anatomy import known_anatomy
from icl_lib.paper.experiments.language import LANGUAGE_MODELS, small_language_model

POST_NORM = ("Gemma 3", "OLMo 2")


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_last_token_alone_answers_as_after_its_prompt(name):
    model, ids = shared(name), prompts(1)
    before, wanted = state(model), model(ids).logits[:, -1:]
    patch = absorb(model, ids, LENGTH - 1)
    assert isinstance(patch, Patch)
    bare = patch.bare(ids)
    assert bare["input_ids"].tolist() == ids[:, -1:].tolist()
    assert bare["position_ids"].tolist() == [[LENGTH - 1]]
    edited = patch.merged(model)
    assert [type(part) for part in edited.modules()] == [type(part) for part in model.modules()]
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in edited.modules())
    with patch.applied(model) as patched:
        assert patched is model
        by_factors = model(**bare).logits
    assert relative(edited(**bare).logits, wanted) < 1e-12
    assert relative(by_factors, wanted) < 1e-12
    assert relative(model(**bare).logits, wanted) > 1e-2
    assert wanted.std() > 0.5
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["GPT-2", "OPT"])
def test_the_token_keeps_its_position(name):
    model, ids = shared(name), prompts(1)
    edited = absorb(model, ids, LENGTH - 1).merged(model)
    assert relative(edited(ids[:, -1:]).logits, model(ids).logits[:, -1:]) > 1e-2


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_in_single_precision(name):
    model, ids = shared(name, torch.float32), prompts(1)
    wanted = model(ids).logits
    for tokens in (1, 4):
        patch = absorb(model, ids, LENGTH - tokens)
        edited, bare = patch.merged(model), patch.bare(ids)
        with patch.applied(model):
            assert relative(model(**bare).logits, wanted[:, -tokens:]) < 1e-5
        assert relative(edited(**bare).logits, wanted[:, -tokens:]) < 1e-5
        assert relative(model(**bare).logits, wanted[:, -tokens:]) > 1e-2


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_several_tokens_each_with_its_own_edits_or_one_for_all(name):
    model, ids = shared(name), prompts(2)
    before, wanted = state(model), model(ids).logits
    own = absorb(model, ids, LENGTH - 5)
    first = next(iter(own.blocks[0].edits))
    if "[" not in first:
        assert own.blocks[0].edits[first].shape[:2] == (2, 5)
        assert own.blocks[0].edits[first].rank().unique().tolist() == [1]
    with own.applied(model):
        assert relative(model(**own.bare(ids)).logits, wanted[:, -5:]) < 1e-12
    # One edit for the five tokens of one prompt. A norm that computes in float32 has nothing that could make up for it.
    bound = 1e-6 if name in POST_NORM else 1e-12
    one = absorb(model, ids[:1], LENGTH - 5, joint=True)
    assert all(len(edit.shape) <= 2 for block in one.blocks for edit in block.edits.values())
    ranks = [int(edit.rank()) for edit in one.blocks[1].edits.values() if len(edit.shape) == 2]
    assert max(ranks) == 5 or (name in MIXTURES and 1 < max(ranks) < 5)  # an expert sees a part of the tokens
    bare = one.bare(ids[:1])
    with one.applied(model):
        assert relative(model(**bare).logits, wanted[:1, -5:]) < bound
    assert relative(one.merged(model)(**bare).logits, wanted[:1, -5:]) < bound
    with absorb(model, ids[1:], LENGTH - 5, joint=True).applied(model):  # another prompt's edits do not do
        assert relative(model(**bare).logits, wanted[:1, -5:]) > 1e-2
    assert same(before, state(model))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_verification(name):
    model, ids = shared(name), prompts(2)
    before = state(model)
    last = verify(model, ids, LENGTH - 1)
    assert last.holds, last
    assert (last.tolerance, last.tested, len(last.error)) == (1e-12, 1, 6)
    assert last.output_control > 1e-2
    assert "transformers" in last.versions
    every = verify(model, ids, LENGTH - 1, reference="self")
    assert every.holds, every
    assert [len(block) for block in every.error] == [LENGTH] * 6
    assert [len(block) for block in every.control] == [32] * 6
    assert every.tested == 31 / 32  # the first token has no context
    assert every.output_control == pytest.approx(last.output_control, rel=1e-6)
    joint = verify(model, ids[:1], LENGTH - 4, joint=True)
    assert joint.holds, joint
    assert joint.tolerance == (1e-5 if name in POST_NORM else 1e-12)
    assert same(before, state(model))


@pytest.mark.parametrize(
    "name",
    [name if name in ("Llama", "Mixtral") else pytest.param(name, marks=pytest.mark.slow) for name in LANGUAGE_MODELS],
)
def test_greedy_generation_agrees_token_by_token(name):
    model, ids = shared(name, torch.float32), prompts(5, length=24)
    found = greedy_agreement(model, ids, max_new_tokens=20)
    assert found.tokens.shape == (5, 20)
    assert found.share == 1
    assert found.control < 0.6
    assert found.error < 1e-5
    written = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=-1, pad_token_id=0)[:, 24:]
    assert torch.equal(found.tokens, written)  # and so it is the model's ordinary generation


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "OPT", "Phi"])
def test_a_bias_can_take_the_change(name):
    model, ids = shared(name), prompts(1)
    wanted, patch = model(ids).logits, absorb(model, ids, LENGTH - 3, outer="bias")
    with patch.applied(model):
        assert relative(model(**patch.bare(ids)).logits, wanted[:, -3:]) < 1e-12
    single = absorb(model, ids, LENGTH - 1, outer="bias")
    edited = single.merged(model)
    assert relative(edited(**single.bare(ids)).logits, wanted[:, -1:]) < 1e-12
    with pytest.raises(ValueError, match=r"\[0\]\..*: 3 positions need 3 vectors, but a joint edit has only one"):
        patch.merged(model)


@pytest.mark.parametrize("name", POST_NORM)
def test_a_scale_alone_can_take_the_change(name):
    """The papers' choice: exact in float64, but it divides by features of which some are nearly zero."""
    model, ids = shared(name), prompts(1)
    patch = absorb(model, ids, LENGTH - 1, outer="scale")
    assert [list(block.outer) for block in patch.blocks] == [["post_feedforward_layernorm"]] * 6
    bare, wanted = patch.bare(ids), model(ids).logits[:, -1:]
    with patch.applied(model):
        assert relative(model(**bare).logits, wanted) < 1e-12
    assert relative(patch.merged(model)(**bare).logits, wanted) < 1e-10
    assert verify(model, ids, LENGTH - 1, reference="self", outer="scale").holds
    with pytest.raises(ValueError, match="4 positions need 4 vectors"):
        absorb(model, ids, LENGTH - 4, outer="scale", joint=True)
    turning = absorb(model, ids, LENGTH - 1)
    largest = [
        max(block.outer["post_feedforward_layernorm"].abs().max().item() for block in one.blocks)
        for one in (patch, turning)
    ]
    assert largest[0] > 10 * largest[1]


@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Mixtral", "GPT-J"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_put_back_whatever_happens(name, error):
    model, ids = shared(name), prompts(1)
    before, patch = state(model), absorb(model, ids, LENGTH - 1)

    def interrupted():
        with patch.applied(model):
            assert not same(before, state(model))
            # No parameter is touched even inside.
            assert all(torch.equal(before[2][key], value) for key, value in model.state_dict().items())
            raise error

    with pytest.raises(error):
        interrupted()
    assert same(before, state(model))


def generate(model, ids, _):
    return greedy_agreement(model, ids, max_new_tokens=2)


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("name", ["Llama", "Gemma 3", "Mixtral"])
@pytest.mark.parametrize("function", [absorb, verify, generate])
def test_a_pass_that_fails_in_the_middle_leaves_nothing_behind(function, name, place, passes):
    model, ids = small_language_model(name), prompts(1)
    before, calls = None, []

    def fail(*_):
        calls.append(1)
        if len(calls) == passes:
            raise RuntimeError("in the middle")

    hook = model.model.layers[place].self_attn.register_forward_hook(fail)
    before = state(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        function(model, ids, LENGTH - 1)
    assert same(before, state(model))
    hook.remove()


def test_a_patched_model_is_not_patched_again_and_refuses_other_inputs():
    model, ids = shared("Llama"), prompts(1)
    patch = absorb(model, ids, LENGTH - 4)
    with patch.applied(model):
        for again in (lambda: patch.applied(model).__enter__(), lambda: absorb(model, ids, 5)):
            with pytest.raises(ValueError, match="leave the `with` block"):
                again()
        with pytest.raises(ValueError, match=r"reads 64 tokens, but its edit was made for 4: call .*patch.bare"):
            model(ids)


@pytest.mark.parametrize("other", ["Qwen 3", "Phi-3"])
def test_a_patch_for_another_model_is_refused(other):
    patch = absorb(shared("Llama"), prompts(1), LENGTH - 1)
    model = shared(other, torch.float32)
    before = state(model)
    with pytest.raises(ValueError, match=r"give the model (that|of) "), patch.applied(model):
        pass
    assert same(before, state(model))


def test_gemma_with_its_image_tower():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 96, "boi_token_index": 95, "eoi_token_index": 94}
    parts = {"text_config": small_language_model("Gemma 3").config, "vision_config": vision, "mm_tokens_per_image": 4}
    config = transformers.Gemma3Config(**parts, **tokens)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().double()
    report = verify(model, prompts(1) % 94, LENGTH - 1)
    assert report.holds
    assert report.model == "Gemma3ForConditionalGeneration"
    assert report.output_control > 1e-2


def test_a_mixture_may_run_as_it_likes_outside():
    model, ids = small_language_model("Mixtral", torch.float32), prompts(1)
    model.set_experts_implementation("grouped_mm")
    patch = absorb(model, ids, LENGTH - 2)
    with patch.applied(model):
        answer = model(**patch.bare(ids)).logits
    assert model.config._experts_implementation == "grouped_mm"
    assert relative(answer, model(ids).logits[:, -2:]) < 1e-5
    assert relative(patch.merged(model)(**patch.bare(ids)).logits, model(ids).logits[:, -2:]) < 1e-5


@pytest.mark.parametrize("name", MIXTURES)
def test_only_the_active_experts_are_edited(name):
    model, ids = shared(name), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    edited = patch.merged(model)
    with_experts = [i for i, block in enumerate(model.model.layers) if hasattr(block.mlp, "experts")]
    assert with_experts == (list(range(6)) if name == "Mixtral" else [1, 3, 5])
    for index in with_experts:
        for part in ("gate_up_proj", "down_proj"):
            old, new = (getattr(one.model.layers[index].mlp.experts, part) for one in (model, edited))
            changed = [not torch.equal(a, b) for a, b in zip(old, new, strict=True)]
            assert sum(changed) == 2
        assert "mlp.gate" in patch.blocks[index].inner


def test_the_norms_of_the_edits_are_those_of_the_matrices():
    for name in ("Llama", "Mixtral", "Gemma 3"):
        patch = absorb(shared(name), prompts(2), LENGTH - 1, reference="self")
        for block in patch.blocks[:2]:
            inner, outer = block.norms()
            assert inner.shape == outer.shape == block.change.shape[:-1] == (2, LENGTH)
            assert (inner[:, 1:] > 0).all()
            assert (outer[:, 1:] > 0).all()
            assert inner[:, 0].max() < 1e-12  # the first token has no context
        if name == "Llama":
            dense = [edit.dense().flatten(-2).norm(dim=-1) for edit in block.inner.values()]
            torch.testing.assert_close(inner, torch.stack(dense).norm(dim=0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_half_precision_is_measured(name):
    model, ids = shared(name, torch.bfloat16), prompts(1)
    report = verify(model, ids, LENGTH - 1)
    assert 1e-4 < report.output_error < 5e-2
    assert report.output_control > 0.5
    wanted = model(ids).logits.float()
    for tokens in (1, 3):
        patch = absorb(model, ids, LENGTH - tokens)
        answer = patch.merged(model)(**patch.bare(ids)).logits.float()
        assert relative(answer, wanted[:, -tokens:]) < 5e-2


def test_each_block_of_a_merged_model_makes_up_for_the_rounding_of_those_before_it():
    """With edits found in other arithmetic than the merged model's, errors would add up from block to block."""
    model, ids = small_language_model("Llama", torch.bfloat16, blocks=24), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    wanted, bare = model(ids).logits[:, -1:].float(), patch.bare(ids)
    errors = [
        relative(one(**bare).logits.float(), wanted)
        for one in (patch.merged(model), merged_as_is(patch.joint(model), model))
    ]
    assert errors[0] < 2e-2 < errors[1] / 2


def merged_as_is(patch, model):
    """A copy with the patch's own edits added to its weights."""
    edited = copy.deepcopy(model)
    for block, edits in zip(edited.model.layers, patch.blocks, strict=True):
        for path, edit in edits.edits.items():
            block.get_submodule(path).weight += edit.dense()
    return edited


def test_batches_of_any_shape():
    model, ids = shared("Llama"), prompts(2, 3, length=9)
    patch = absorb(model, ids, 7)
    assert patch.blocks[0].weight.shape == (2, 3, 2, 64, 32)
    with patch.applied(model):
        answer = model(**patch.bare(ids)).logits
    assert relative(answer, model(ids.flatten(0, 1)).logits[:, 7:]) < 1e-12
    single = absorb(model, ids[0, 0], 8)
    assert single.blocks[0].weight.shape == (1, 64, 32)


def test_a_wrong_edit_is_reported(monkeypatch):
    """The check can fail: with an epsilon in the denominator, or with an edit left out, it does."""
    model, ids = shared("Llama"), prompts(1)
    module = sys.modules["icl_lib.models.block_edits"]
    for formula, factor in itertools.product(("weight_update", "output_update"), (1 + 1e-8, 0.0)):
        right = getattr(module, formula)
        with monkeypatch.context() as patched:
            patched.setattr(module, formula, lambda *args, right=right, factor=factor: factor * right(*args))
            report = verify(model, ids, LENGTH - 1)
        assert not report.holds
        assert report.max_error > 1e-10
    assert verify(model, ids, LENGTH - 1).holds


def test_a_model_placed_by_accelerate_works_as_it_is():
    model, ids = small_language_model("Llama"), prompts(1)
    wanted = model(ids).logits[:, -3:]
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{index}": "cpu" for index in range(6)}
    model = accelerate.dispatch_model(model, device_map, force_hooks=True)
    assert hasattr(model.model.layers[0], "_hf_hook")
    patch = absorb(model, ids, LENGTH - 3)
    with patch.applied(model):
        assert relative(model(**patch.bare(ids)).logits, wanted) < 1e-12
    assert relative(patch.merged(model)(**patch.bare(ids)).logits, wanted) < 1e-12
    assert verify(model, ids, LENGTH - 1, reference="self").holds
    assert hasattr(model.model.layers[0], "_hf_hook")


def test_a_bar_over_blocks(capsys, monkeypatch):
    model, ids = shared("Llama"), prompts(1)
    absorb(model, ids, LENGTH - 1)
    assert capsys.readouterr().err == ""
    absorb(model, ids, LENGTH - 1, progress=True)
    assert "block" in capsys.readouterr().err
    monkeypatch.setenv("ICL_LIB_BOOK_BUILD", "1")
    verify(model, ids, LENGTH - 1, progress=True)
    assert capsys.readouterr().err == ""


def test_the_patch_is_light_and_says_what_it_is():
    patch = absorb(shared("Llama"), prompts(1), LENGTH - 1)
    assert isinstance(patch, Patch)
    assert (patch.reference, patch.first, patch.context_length, patch.outer_kind) == ("query", 63, 63, "down")
    assert patch.anatomy == known_anatomy(shared("Llama"))
    assert list(patch.blocks[0].inner) == ["mlp.gate_proj", "mlp.up_proj"]
    assert list(patch.blocks[0].outer) == ["mlp.down_proj"]


def test_the_library_alone_does_not_import_transformers():
    code = "import sys, icl_lib; sys.exit(any(name in sys.modules for name in ('transformers', 'peft', 'typer')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_joint_edit_has_no_norm_at_a_position():
    model, ids = shared("Mixtral"), prompts(1)
    with pytest.raises(ValueError, match="this patch is joint"):
        absorb(model, ids, LENGTH - 3, joint=True).blocks[0].norms()
