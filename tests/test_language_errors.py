"""What a user can get wrong with a language model: a ValueError names it, and the model is not changed."""

import pytest
import torch
from cases import relative
from language import LENGTH, VOCABULARY, prompts, same, shared, state
from torch import nn

from icl_lib import Anatomy, Transformer, TransformerConfig, absorb, greedy_agreement, register_anatomy, verify
from icl_lib.models.anatomy import ARCHITECTURES, known_anatomy, sites
from icl_lib.paper.experiments.language import small_language_model

IDS = torch.arange(LENGTH)[None]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inputs": IDS[:, :0]}, "there is no token in them"),
        ({"inputs": IDS[:0]}, "there is no token in them"),
        ({"inputs": torch.tensor(3)}, "there is no token in them"),
        ({"inputs": IDS[:, :1]}, r"inputs hold 1 token\(s\)"),
        (
            {"inputs": torch.where(IDS == 7, VOCABULARY, IDS)},
            r"inputs\[0, 7\] is 97: this model has the tokens .* 96",
        ),
        ({"inputs": torch.where(IDS == 7, -1, IDS)}, r"inputs\[0, 7\] is -1"),
        ({"inputs": IDS.repeat(1, 3)}, "inputs hold 192 tokens: this model has positions for 128"),
        ({"inputs": IDS.short()}, r"dtype torch.int16: give token ids as inputs.long\(\)"),
        ({"inputs": IDS > 3}, "dtype torch.bool"),
        ({"inputs": IDS.to("meta")}, "device meta"),
        ({"inputs": torch.randn(1, 9, 32).double()}, "is a language model: give it token ids"),
        ({"inputs": [1, 2]}, "inputs is a list"),
        ({"context_length": 0}, "context_length is 0 .* at least one token must be replaced"),
        ({"context_length": LENGTH}, f"context_length is {LENGTH} .* at least one must remain"),
        ({"context_length": -3}, "context_length is -3"),
        ({"context_length": 1.5}, "context_length is 1.5"),
        ({"reference": "token"}, "reference is 'token'"),
        ({"positions": "some"}, "positions is 'some'"),
        ({"positions": "all"}, "positions='all' needs reference='self'"),
        (
            {"outer": "scale"},
            "outer is 'scale': for the blocks of LlamaForCausalLM choose 'down' or 'bias'",
        ),
        ({"joint": 1}, "joint is 1"),
        ({"joint": True, "context_length": 5}, "59 vectors of width 32 are not linearly independent"),
    ],
)
@pytest.mark.parametrize("function", [absorb, verify])
def test_bad_arguments_are_named(function, change, says):
    model = shared("Llama")
    before = state(model)
    arguments = {"model": model, "inputs": IDS, "context_length": LENGTH - 1, **change}
    with pytest.raises(ValueError, match=says):
        function(**arguments)
    assert same(before, state(model))


def test_an_unknown_architecture_is_probed_and_its_entry_printed_once(monkeypatch, capsys):
    known = ARCHITECTURES["llama"]
    monkeypatch.delitem(ARCHITECTURES, "llama")
    model = small_language_model("Llama")
    for said in (f"register_anatomy(LlamaForCausalLM, {known!r})", ""):
        assert absorb(model, IDS, 5).anatomy == known
        assert said in capsys.readouterr().err
    assert capsys.readouterr().err == ""


def test_an_entry_that_misses_an_inner_map_is_found_out_by_verify(monkeypatch):
    right = ARCHITECTURES["llama"]
    wrong = Anatomy(right.blocks, right.stream, right.inner[1:], right.outer)
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)
    report = verify(shared("Llama"), IDS, LENGTH - 1)
    assert not report.holds
    assert report.max_error > 1e-3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Anatomy("model.layers", "mlp.norm", ("mlp.up_proj",), "mlp.down_proj"), r"layers\[0\] has no 'mlp.norm'"),
        (Anatomy("layers", "mlp", ("mlp.up_proj",), "mlp.down_proj"), "LlamaForCausalLM has no 'layers'"),
        (
            Anatomy("model.layers", "mlp", ("mlp.act_fn",), "mlp.down_proj"),
            "mlp.act_fn is a SiLU.*: it must be",
        ),
        (
            Anatomy("model.layers", "mlp", ("mlp.up_proj.weight",), "mlp.down_proj"),
            r"mlp.up_proj.weight is a parameter \[64, 32\]: that of experts must be \[expert, out, in\]",
        ),
    ],
)
def test_an_entry_that_does_not_fit_is_named(monkeypatch, wrong, says):
    monkeypatch.setitem(ARCHITECTURES, "llama", wrong)
    with pytest.raises(ValueError, match=says):
        sites(shared("Llama"), known_anatomy(shared("Llama")))


def test_an_entry_for_a_class_comes_before_that_of_its_architecture(monkeypatch):
    from icl_lib.models import anatomy

    monkeypatch.setattr(anatomy, "_ENTRIES", dict(anatomy._ENTRIES))
    model = shared("Llama")
    mine = Anatomy("model.layers", "post_attention_layernorm", ("mlp.up_proj", "mlp.gate_proj"), "mlp.down_proj")
    register_anatomy(type(model), mine)
    assert absorb(model, IDS, 63).anatomy == mine
    assert verify(model, IDS, 63).holds


def test_weights_that_are_not_numbers():
    for place in ("model.layers.3.mlp.up_proj", "model.layers.2.self_attn.v_proj", "lm_head"):
        model = small_language_model("Llama")
        model.get_submodule(place).weight[0, 0] = float("nan")
        before = state(model)
        for function in (absorb, verify):
            with pytest.raises(ValueError, match="nan"):
                function(model, IDS, LENGTH - 1)
        after = state(model)
        assert before[:2] == after[:2]


def test_a_quantised_model_is_refused():
    model = small_language_model("Llama")
    packed = nn.Parameter(torch.zeros(64, 16, dtype=torch.uint8), requires_grad=False)
    model.model.layers[2].mlp.up_proj.weight = packed
    with pytest.raises(ValueError, match="Quantised models"):
        absorb(model, IDS, LENGTH - 1)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("GPT-2", {"resid_pdrop": 0.1}, "Dropout in training mode"),
        ("Llama", {"attention_dropout": 0.1}, "attention_dropout=0.1 in training mode"),
        ("Mixtral", {"router_jitter_noise": 0.1}, "jitter_noise=0.1 in training mode"),
    ],
)
def test_dropout_in_training_mode_is_refused(name, changes, says):
    model = small_language_model(name, **changes).train()
    with pytest.raises(ValueError, match=says + r".*eval\(\)"):
        absorb(model, IDS, LENGTH - 1)
    assert verify(model.eval(), IDS, LENGTH - 1).holds


def test_training_mode_without_dropout_is_no_obstacle():
    assert verify(small_language_model("Llama").train(), IDS, LENGTH - 1).holds


def test_the_meta_device_is_refused():
    with torch.device("meta"):
        model = type(shared("Llama"))(shared("Llama").config).eval()
    with pytest.raises(ValueError, match="meta, which holds no values"):
        absorb(model, IDS, LENGTH - 1)


def test_autocast_is_refused():
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is on"):
        absorb(shared("Llama"), IDS, LENGTH - 1)


def test_a_model_of_streams_is_not_fed_tokens():
    with pytest.raises(ValueError, match="the forward pass of Transformer has no argument input_ids"):
        absorb(Transformer(TransformerConfig(dim=4)), IDS, 5)


def test_streams_have_joint_edits_too():
    model, inputs = Transformer(TransformerConfig(dim=4)).double(), torch.randn(5, 4).double()
    patch = absorb(model, inputs, 3, joint=True)
    assert [edit.shape for edit in patch.blocks[0].edits.values()] == [(16, 4), (4, 16)]
    edited = patch.merged(model)
    assert relative(edited(patch.bare(inputs)), model(inputs)[3:]) < 1e-12
    assert relative(model(patch.bare(inputs)), model(inputs)[3:]) > 1e-2
    with pytest.raises(ValueError, match="2 positions need 2 vectors"):
        absorb(model, inputs, 3, joint=True, outer="bias")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_ids": [1, 2]}, "input_ids is a list"),
        ({"input_ids": IDS[:, :1]}, "inputs hold 1 token"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 100}, "64 tokens and 100 new ones need more positions than the 128 of this model"),
        ({"outer": "scale"}, "outer is 'scale'"),
    ],
)
def test_bad_arguments_of_generation_are_named(change, says):
    arguments = {"model": shared("Llama"), "input_ids": IDS, "max_new_tokens": 2, **change}
    with pytest.raises(ValueError, match=says):
        greedy_agreement(**arguments)


def test_layers_that_use_a_weight_in_another_way_are_refused():
    """An edited weight supports products; any other use would ignore the edit, and raises an error."""
    model = small_language_model("Llama")
    patch = absorb(model, prompts(1), LENGTH - 1)
    with patch.applied(model):
        weight = model.model.layers[0].mlp.up_proj.weight
        assert (weight.shape, weight.dtype) == ((64, 32), torch.float64)
        with pytest.raises(AttributeError, match=r"uses weight.abs, which would ignore the edit"):
            _ = weight.abs
        with pytest.raises(ValueError, match="mul, which would ignore the edit"):
            torch.mul(torch.ones(32).double(), weight)
