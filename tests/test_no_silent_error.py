"""A patch that does not reproduce its prompt is never returned, and inputs are what was meant."""

import copy
import pickle
import re
import string
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from torch.nn.utils import parametrize, prune
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    LlamaForSequenceClassification,
    MptConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    RobertaConfig,
)

from icl_lib import Anatomy, Transformer, TransformerConfig, absorb, verify
from icl_lib.measures import relative_error
from icl_lib.models.anatomy import _ENTRIES, ARCHITECTURES
from icl_lib.models.architectures import LLAMA, MIXTRAL
from icl_lib.models.text import tokens_of
from icl_lib.paper.experiments import small_language_model
from icl_lib.widgets import explore

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(config, dtype=torch.float64):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval().requires_grad_(False)


def lively(config, dtype=torch.float64):
    """The same with weights so large that the logits depend on the context."""
    model = build(config, dtype)
    for path, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.copy_((0.5 if "embed" in path else parameter.shape[-1] ** -0.5) * torch.randn_like(parameter))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the only implementation that runs in float64
    return model


QWEN2_MOE = Qwen2MoeConfig(
    **SMALL,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randperm(90)[None, :12] + 3


class TestAPatchReproducesItsPrompt:
    def test_a_factor_on_a_branch_that_the_entry_does_not_name(self, ids, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "granite", LLAMA)
        scaled = build(GraniteConfig(**SMALL, residual_multiplier=0.22))
        with pytest.raises(
            ValueError, match=r"model.layers\[0\]: with its edits .*probing finds .*multiplier='residual_multiplier'"
        ):
            absorb(scaled, ids, 11)
        plain = build(GraniteConfig(**SMALL, residual_multiplier=1.0))  # negative control: nothing in the way
        assert verify(plain, ids, 11).holds
        absorb(plain, ids, 11)

    def test_a_shared_expert_that_the_entry_does_not_name(self, ids, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "qwen2_moe", MIXTRAL)
        with pytest.raises(ValueError, match=r"model.layers\[0\]: with its edits .*probing finds .*shared_expert_gate"):
            absorb(lively(QWEN2_MOE), ids, 11)

    def test_a_hook_on_a_known_model(self, ids):
        model = small_language_model("Llama")
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: 0.5 * out)
        with pytest.raises(ValueError, match=r"model.layers\[1\]: with its edits "):
            absorb(model, ids, 9)
        handle.remove()
        absorb(model, ids, 9)

    def test_the_model_is_left_as_it_was(self, ids):
        model = small_language_model("Llama")
        before, state = model(ids).logits, copy.deepcopy(model.state_dict())
        handle = model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: 2 * out)
        with pytest.raises(ValueError, match="with its edits"):
            absorb(model, ids, 9)
        handle.remove()
        assert torch.equal(model(ids).logits, before)
        assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())

    def test_a_joint_edit_that_has_no_digits_left(self):
        """One scale for five tokens, in float32: it is refused where it does not reproduce the prompt."""
        config = Olmo2Config(
            vocab_size=99,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
        )
        model, said = build(config, torch.float32), []
        for seed in range(8):
            torch.manual_seed(seed)
            prompt = torch.randperm(90)[None, :15] + 3
            patch = absorb(model, prompt, 10)
            try:
                merged = patch.merged(model)
            except ValueError as error:
                said.append(str(error))
                continue
            wanted = model(prompt).logits[:, 10:]
            assert relative_error(merged(**patch.bare(prompt)).logits, wanted).max() < 1e-3
        assert 0 < len(said) < 8
        assert all("one edit serves all" in one or "no scale" in one for one in said), said

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_no_false_alarm_in_16_bits(self, dtype):
        config = Olmo2Config(
            vocab_size=500,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            eos_token_id=1,
        )
        torch.manual_seed(3)
        prompt = torch.randperm(450)[None, :61] + 3
        model = build(config, dtype)
        assert verify(model, prompt, 60).holds
        absorb(model, prompt, 60)


class TestWhatRunsIsEdited:
    def test_a_compiled_wrapper_is_refused(self, ids):
        model = small_language_model("Llama")
        compiled = torch.compile(model, backend="eager")
        patch = absorb(model, ids, 9)
        for attempt in (
            lambda: absorb(compiled, ids, 9),
            lambda: patch.merged(compiled),
            lambda: verify(compiled, ids, 9),
        ):
            with pytest.raises(ValueError, match="model is compiled, so edits would not reach it"):
                attempt()
        with pytest.raises(ValueError, match="model is compiled"), patch.applied(compiled):
            pass

    def test_a_shared_weight_is_refused(self, ids):
        model = small_language_model("Llama")
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(
            ValueError, match=r"layers\[1\].mlp.up_proj is the same weight as model.layers\[0\].mlp.up_proj"
        ):
            absorb(model, ids, 9)

    def test_relative_positions_need_no_position_ids(self, ids, monkeypatch):
        bloom = build(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4))
        mpt = build(MptConfig(vocab_size=99, d_model=32, n_layers=2, n_heads=4))
        entry = Anatomy(
            blocks="transformer.h",
            stream="post_attention_layernorm",
            inner=("mlp.dense_h_to_4h",),
            outer="mlp.dense_4h_to_h",
        )
        monkeypatch.setitem(_ENTRIES, type(bloom), entry)
        entry = Anatomy(blocks="transformer.blocks", stream="norm_2", inner=("ffn.up_proj",), outer="ffn.down_proj")
        monkeypatch.setitem(_ENTRIES, type(mpt), entry)
        for model in (bloom, mpt):
            assert verify(model, ids, 9).max_error < 1e-12
            patch = absorb(model, ids, 9)
            assert set(patch.bare(ids)) == {"input_ids"}
            with patch.applied(model):
                edited = model(**patch.bare(ids)).logits
            wanted = model(ids).logits[:, 9:]
            assert relative_error(edited, wanted).max() < 1e-12
            assert relative_error(model(**patch.bare(ids)).logits, wanted).max() > 1e-2


class TestPromptsOfDifferentLengths:
    @pytest.mark.parametrize(("row", "side"), [([0, 0, 0, 5, 6, 7], "begins"), ([5, 6, 7, 8, 0, 0], "ends")])
    def test_a_padded_batch_is_refused(self, row, side):
        model = build(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=0))
        batch = torch.tensor([row, [11, 12, 13, 14, 15, 16]])
        for function in (absorb, verify):
            with pytest.raises(ValueError, match=rf"different lengths: row 0 {side} with \d padding token"):
                function(model, batch, 3)
        absorb(model, batch[1:], 3)
        absorb(model, torch.tensor([row]), 3)  # nothing tells padding from text in a single prompt

    def test_a_beginning_that_all_prompts_share_is_no_padding(self):
        model = build(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, pad_token_id=0))
        absorb(model, torch.tensor([[0, 5, 6, 7], [0, 8, 9, 10]]), 2)


class TestTextIsTokenisedTogether:
    @staticmethod
    def tokenizer(template="<s> $A </s>", merges=()):
        letters = ["<s>", "</s>", *string.printable, *("".join(pair) for pair in merges)]
        made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=list(merges)))
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
        return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")

    def test_an_end_of_text_is_not_put_before_the_query(self):
        tokenizer = self.tokenizer()
        ids, split = tokens_of(tokenizer, "2+3=10, ", "2+8=")
        assert ids == tokenizer("2+3=10, 2+8=")["input_ids"][:-1]
        assert split == 1 + len("2+3=10, ")

    def test_a_token_across_the_boundary_is_named(self):
        tokenizer = self.tokenizer(merges=[(" ", "2")])
        with pytest.raises(ValueError, match=r"the token ' 2' covers the end of the prompt"):
            tokens_of(tokenizer, "2+3=10, ", "2+8=")
        assert tokens_of(tokenizer, "2+3=10,", " 2+8=")[1] == 1 + len("2+3=10,")

    @pytest.mark.parametrize(("prompt", "query", "name"), [("", "2", "prompt"), ("2", "", "query")])
    def test_an_empty_text_is_named(self, prompt, query, name):
        with pytest.raises(ValueError, match=f"{name} holds no token"):
            tokens_of(self.tokenizer("$A"), prompt, query)

    def test_a_tokenizer_without_places_is_refused(self):
        with pytest.raises(ValueError, match="does not say where its tokens stand"):
            tokens_of(object(), "a", "b")


def test_a_patch_travels_without_its_model(ids, tmp_path):
    model = small_language_model("Llama")
    patch = absorb(model, ids, 9)
    torch.save(patch, tmp_path / "patch.pt")
    for loaded in (pickle.loads(pickle.dumps(patch)), torch.load(tmp_path / "patch.pt", weights_only=False)):
        with patch.applied(model):
            wanted = model(**patch.bare(ids)).logits
        with loaded.applied(model):
            assert torch.equal(model(**loaded.bare(ids)).logits, wanted)
        loaded.to_lora(tmp_path / "adapter", model, overwrite=True)
        with pytest.raises(ValueError, match="the model of this patch no longer exists"):
            loaded.to_lora(tmp_path / "adapter")


def test_a_picture_that_needs_a_script_stops_the_build(monkeypatch):
    class Script:
        def __init__(self, text):
            self._repr_html_ = lambda: text

    monkeypatch.setenv("ICL_LIB_BOOK_BUILD", "1")
    with pytest.raises(ValueError, match="draws itself by a script"):
        explore(lambda k: Script("<div></div><script>draw()</script>"), k=[1, 2])
    explore(lambda k: Script("<div></div>"), k=[1, 2])


def shape_of_llama():
    return small_language_model("Llama", blocks=2)


class TestWhatStandsBetweenAWeightAndItsProduct:
    """Each is refused with its name, or the edits reproduce the prompt all the same."""

    def parametrized(self, model):
        class Doubled(torch.nn.Module):
            def forward(self, weight):
                return 2 * weight

        parametrize.register_parametrization(model.model.layers[1].mlp.up_proj, "weight", Doubled())

    def weight_normed(self, model):
        torch.nn.utils.parametrizations.weight_norm(model.model.layers[1].mlp.up_proj)

    def pruned(self, model):
        prune.random_unstructured(model.model.layers[1].mlp.up_proj, "weight", 0.3)

    def hooked(self, model):
        model.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],))

    def compiled_block(self, model):
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")

    def compiled_forward(self, model):
        mlp = model.model.layers[1].mlp
        mlp.forward = torch.compile(mlp.forward, backend="eager")

    def shared_across_modules(self, model):
        first, second = (layer.mlp.down_proj for layer in model.model.layers)
        second.weight = first.weight

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ("parametrized", r"model.layers\[1\].mlp.up_proj.weight is computed from other parameters"),
            ("weight_normed", r"model.layers\[1\].mlp.up_proj.weight is computed from other parameters"),
            ("pruned", r"model.layers\[1\].mlp.up_proj.weight is computed from other parameters"),
            ("hooked", r"model.layers\[1\].mlp.up_proj carries a forward hook"),
            ("compiled_block", r"model.model.layers.1 is compiled"),
            ("compiled_forward", r"model.model.layers.1.mlp.forward is compiled"),
            (
                "shared_across_modules",
                r"layers\[1\].mlp.down_proj is the same weight as model.layers\[0\].mlp.down_proj",
            ),
        ],
    )
    def test_it_is_named(self, ids, change, says):
        model = shape_of_llama()
        absorb(model, ids, 9)
        getattr(self, change)(model)
        for function in (absorb, verify):
            with pytest.raises(ValueError, match=says):
                function(model, ids, 9)

    def test_a_subclass_of_linear_with_its_own_product(self, ids):
        class Mine(torch.nn.Linear):
            def forward(self, read):
                return read @ self.weight.T

        model = shape_of_llama()
        for layer in model.model.layers:
            for name in ("gate_proj", "down_proj"):
                getattr(layer.mlp, name).__class__ = Mine
        patch = absorb(model, ids, 11)
        edited, wanted = patch.merged(model)(**patch.bare(ids)).logits, model(ids).logits[:, 11:]
        assert relative_error(edited, wanted).max() < 1e-12
        with patch.applied(model):
            assert relative_error(model(**patch.bare(ids)).logits, wanted).max() < 1e-12
        assert relative_error(model(**patch.bare(ids)).logits, wanted).max() > 1e-2


class TestTheCauseIsFound:
    """An entry that is wrong is refused with the one that is right."""

    @pytest.mark.parametrize(
        "wrong",
        [
            {"inner": ("mlp.gate_proj",)},
            {"multiplier": 0.5},
            {"skip_multiplier": 2.0},
            {"stream": "input_layernorm"},
        ],
        ids=str,
    )
    def test_an_entry_with_an_error(self, ids, monkeypatch, wrong):
        model = shape_of_llama()
        monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA, **wrong))
        with pytest.raises(ValueError, match=r"model.layers\[0\].*but probing finds " + re.escape(repr(LLAMA))):
            absorb(model, ids, 9)
        assert not verify(model, ids, 9).holds

    def test_an_entry_whose_parts_are_called_in_another_order(self, ids, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "llama", replace(LLAMA, outer="self_attn.o_proj"))
        says = r"layers\[0\].self_attn.o_proj is called before model.layers\[0\].post_attention_layernorm"
        for function in (absorb, verify):
            with pytest.raises(ValueError, match=says):
                function(shape_of_llama(), ids, 9)

    def test_a_hook_on_a_part(self, ids):
        model = shape_of_llama()
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: 0.5 * out)
        with pytest.raises(ValueError, match=r"model.layers\[1\]: with its edits .*"):
            absorb(model, ids, 9)
        handle.remove()
        absorb(model, ids, 9)


class TestAnAnatomyCanSayIt:
    """What a block computes besides the plain form, registered by hand under a class of its own."""

    def exact(self, model, ids):
        patch = absorb(model, ids, 11)
        wanted = model(ids).logits[:, 11:]
        assert relative_error(patch.merged(model)(**patch.bare(ids)).logits, wanted).max() < 1e-12
        with patch.applied(model):
            assert relative_error(model(**patch.bare(ids)).logits, wanted).max() < 1e-12
        assert relative_error(model(**patch.bare(ids)).logits, wanted).max() > 1e-2
        assert patch.anatomy == self.entry

    def test_a_branch_multiplier(self, ids, monkeypatch):
        self.entry = replace(LLAMA, multiplier="residual_multiplier")
        monkeypatch.setitem(ARCHITECTURES, "granite", self.entry)
        self.exact(lively(GraniteConfig(**SMALL, residual_multiplier=0.22)), ids)
        self.entry = replace(LLAMA, multiplier=0.22)
        monkeypatch.setitem(ARCHITECTURES, "granite", self.entry)
        self.exact(lively(GraniteConfig(**SMALL, residual_multiplier=0.22)), ids)

    def test_a_shared_expert_and_its_gate(self, ids, monkeypatch):
        shared = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate")
        self.entry = replace(MIXTRAL, inner=(*MIXTRAL.inner, *shared))
        monkeypatch.setitem(ARCHITECTURES, "qwen2_moe", self.entry)
        self.exact(lively(QWEN2_MOE), ids)

    def test_experts_stored_the_other_way(self, ids, monkeypatch):
        self.entry = replace(MIXTRAL, inner=("mlp.router", "mlp.experts.gate_up_proj"))
        monkeypatch.setitem(ARCHITECTURES, "gpt_oss", self.entry)
        config = GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
        self.exact(lively(config), ids)


class TestPaddingBeforeThePrompts:
    """With attention_mask, each prompt of a batch gets what it gets by itself."""

    @pytest.mark.parametrize("name", ["GPT-2", "Llama", "Gemma 3", "Mixtral"])
    def test_each_row_is_as_if_alone(self, name):
        model = small_language_model(name, blocks=2)
        torch.manual_seed(2)
        alone = torch.randperm(80)[None, :9] + 3
        batch = torch.stack([torch.cat([torch.zeros(3).long(), alone[0]]), torch.randperm(80)[:12] + 3])
        mask = torch.ones_like(batch)
        mask[0, :3] = 0
        wanted = torch.cat([model(alone).logits[:, -2:], model(batch[1:]).logits[:, -2:]])
        assert verify(model, batch, 10, attention_mask=mask).holds
        patch = absorb(model, batch, 10, attention_mask=mask)
        with patch.applied(model):
            edited = model(**patch.bare(batch)).logits
        assert relative_error(edited, wanted).max() < 1e-12
        assert relative_error(model(**patch.bare(batch)).logits, wanted).max() > 1e-2
        without = torch.cat([model(batch[:1]).logits[:, -2:], wanted[1:]])  # read without the mask, padding is context
        assert relative_error(without, wanted).max() > 1e-3
        one = absorb(model, batch[:1], 11, attention_mask=mask[:1])
        assert relative_error(one.merged(model)(**one.bare(batch[:1])).logits, wanted[:1, -1:]).max() < 1e-12

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])}, "only padding before the prompt"),
            ({"attention_mask": torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]])}, "only padding before the prompt"),
            ({"attention_mask": torch.ones(2, 4)}, r"attention_mask is \(2, 4\): give a tensor of the shape"),
            ({"attention_mask": [[1] * 5] * 2}, "attention_mask is list: give a tensor"),
            (
                {"attention_mask": torch.tensor([[0, 1, 1, 1, 1], [1] * 5]), "reference": "self"},
                "with reference='self' give positions='query'",
            ),
        ],
        ids=str,
    )
    def test_other_masks_are_refused(self, change, says):
        model, batch = shape_of_llama(), torch.randperm(10).reshape(2, 5) + 3
        with pytest.raises(ValueError, match=says):
            absorb(model, batch, 3, **change)

    def test_a_model_without_a_padding_token_is_padded_with_its_last(self):
        model = build(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, eos_token_id=7, bos_token_id=7))
        batch = torch.tensor([[7, 7, 5, 6, 8], [11, 12, 13, 14, 15]])
        with pytest.raises(ValueError, match=r"row 0 begins with 2 padding token\(s\) \(7\).*give attention_mask"):
            absorb(model, batch, 3)


@pytest.mark.parametrize("name", ["Gemma 3", "Mixtral", "GPT-2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_false_alarm_in_16_bits_elsewhere(name, dtype):
    model = small_language_model(name, dtype)
    torch.manual_seed(3)
    prompt = torch.randperm(97)[None, :61]
    assert verify(model, prompt, 60).holds
    absorb(model, prompt, 60)


@pytest.mark.parametrize("kind", ["own", "joint", "self"])
def test_every_kind_of_patch_can_be_pickled(ids, kind):
    model = shape_of_llama()
    options = {"joint": True} if kind == "joint" else {"reference": "self"} if kind == "self" else {}
    patch = absorb(model, ids, 9, **options)
    loaded = pickle.loads(pickle.dumps(patch))
    with loaded.applied(model):
        edited = model(**loaded.bare(ids)).logits
    with patch.applied(model):
        assert torch.equal(edited, model(**patch.bare(ids)).logits)


class Pooled(Transformer):
    """After the blocks, each token reads all tokens once more."""

    def forward(self, sequence):
        output = super().forward(sequence)
        return output + output.mean(-2, keepdim=True)


def test_context_that_enters_after_the_blocks_is_noticed():
    config, inputs = TransformerConfig(dim=8, blocks=2, heads=2), torch.randn(6, 8).double()
    with pytest.raises(ValueError, match="with the edits of all blocks the model's output differs"):
        absorb(Pooled(config).double(), inputs, 5)
    report = verify(Pooled(config).double(), inputs, 5)
    assert max(map(max, report.error)) < 1e-12 < report.output_error
    assert not report.holds
    absorb(Transformer(config).double(), inputs, 5)


def test_a_patch_from_inference_mode_can_be_used_outside(ids):
    model = shape_of_llama()
    with torch.inference_mode():
        patch = absorb(model, ids, 9)
    model.requires_grad_(True)
    with patch.applied(model):
        logits = model(**patch.bare(ids)).logits
    logits.sum().backward()
    assert relative_error(logits.detach(), model(ids).logits[:, 9:].detach()).max() < 1e-12
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_a_model_that_counts_its_positions_otherwise(ids, monkeypatch):
    """RoBERTa begins at 2. The edits make up for the embedding of another position as well."""
    entry = Anatomy("roberta.encoder.layer", "intermediate", ("intermediate.dense",), "output.dense")
    monkeypatch.setitem(ARCHITECTURES, "roberta", entry)
    model = lively(RobertaConfig(**SMALL, is_decoder=True, max_position_embeddings=64))
    patch = absorb(model, ids + 2, 11)
    wanted = model(ids + 2).logits[:, 11:]
    assert relative_error(patch.merged(model)(**patch.bare(ids + 2)).logits, wanted).max() < 1e-12
    assert relative_error(model(**patch.bare(ids + 2)).logits, wanted).max() > 1e-2


def test_a_classifier_is_refused(ids):
    config = small_language_model("Llama").config
    model = LlamaForSequenceClassification(config).double().eval()
    with pytest.raises(ValueError, match=r"without logits .*give a causal language model"):
        absorb(model, ids, 9)
