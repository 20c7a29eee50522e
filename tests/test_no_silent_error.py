"""A patch that does not reproduce its prompt is never returned, and inputs are what was meant."""

import copy
import pickle
import string

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GraniteConfig,
    MptConfig,
    Olmo2Config,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
)

from icl_lib import Anatomy, absorb, verify
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


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randperm(90)[None, :12] + 3


class TestAPatchReproducesItsPrompt:
    def test_a_factor_on_a_branch_that_the_entry_does_not_name(self, ids, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "granite", LLAMA)
        scaled = build(GraniteConfig(**SMALL, residual_multiplier=0.22))
        with pytest.raises(ValueError, match=r"model.layers\[0\]: with its edits .*a factor on a branch"):
            absorb(scaled, ids, 11)
        plain = build(GraniteConfig(**SMALL, residual_multiplier=1.0))  # negative control: nothing in the way
        assert verify(plain, ids, 11).holds
        absorb(plain, ids, 11)

    def test_a_shared_expert_that_the_entry_does_not_name(self, ids, monkeypatch):
        monkeypatch.setitem(ARCHITECTURES, "qwen2_moe", MIXTRAL)
        config = Qwen2MoeConfig(
            **SMALL,
            num_key_value_heads=2,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
        with pytest.raises(ValueError, match=r"model.layers\[0\]: with its edits .* another map with the same input"):
            absorb(build(config), ids, 11)

    def test_a_hook_on_a_known_model(self, ids):
        model = small_language_model("Llama")
        handle = model.model.layers[1].mlp.register_forward_hook(lambda _, __, out: 0.5 * out)
        with pytest.raises(ValueError, match=r"model.layers\[1\]: with its edits .* a hook"):
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
        loaded.to_lora(tmp_path / "adapter", model)
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
