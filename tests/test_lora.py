"""A prompt as a LoRA adapter: written, loaded by PEFT, and compared with the prompted model."""

import copy
import gc
import json

import peft
import pytest
import torch
from cases import relative
from language import LENGTH, prompts, same, shared, state
from safetensors.torch import load_file

from icl_lib import absorb
from icl_lib.models.lora import write_adapter
from icl_lib.paper.experiments.language import LANGUAGE_MODELS, small_language_model

# PEFT calls a method of transformers that will have another name in its next major version.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def loaded(model, folder):
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_adapter_answers_as_the_prompted_model(name, tmp_path):
    model, ids = shared(name, torch.float32), prompts(1)
    before, wanted = state(model), model(ids).logits[:, -5:]
    patch = absorb(model, ids, LENGTH - 5)
    assert patch.to_lora(tmp_path / "adapter") == tmp_path / "adapter"
    assert same(before, state(model))
    bare = patch.bare(ids)
    adapted = loaded(model, tmp_path / "adapter")
    assert relative(adapted(**bare).logits, wanted) < 1e-5
    assert relative(model(**bare).logits, wanted) > 1e-2
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**bare).logits, model(**bare).logits, rtol=0, atol=0)


def test_what_is_in_the_files(tmp_path):
    model, ids = shared("Llama", torch.float32), prompts(1)
    absorb(model, ids, LENGTH - 3, joint=True).to_lora(tmp_path, model)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["bias"]) == ("LORA", 3, 3, "none")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 6 * 3 * 2
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (3, 64)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (32, 3)


def test_one_prompt_and_one_query_is_a_fine_tuning_of_rank_one(tmp_path):
    model, ids = shared("Llama", torch.float32), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    patch.to_lora(tmp_path, model)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 1
    merged = loaded(model, tmp_path).merge_and_unload()
    assert relative(merged(**patch.bare(ids)).logits, model(ids).logits[:, -1:]) < 1e-5


def test_another_query_is_not_served(tmp_path):
    model, ids, other = shared("Llama", torch.float32), prompts(1), prompts(1)
    absorb(model, ids, LENGTH - 1).to_lora(tmp_path, model)
    mixed = torch.cat([ids[:, :-1], other[:, -1:]], 1)
    bare = absorb(model, mixed, LENGTH - 1).bare(mixed)
    assert relative(loaded(model, tmp_path)(**bare).logits, model(mixed).logits[:, -1:]) > 1e-2


def test_an_earlier_adapter_is_replaced_only_if_told(tmp_path):
    model, ids = shared("GPT-2", torch.float32), prompts(1)
    absorb(model, ids, LENGTH - 4).to_lora(tmp_path, model)
    before = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    patch = absorb(model, ids, LENGTH - 2)
    with pytest.raises(ValueError, match=r"which holds adapter_config.json: .*, or overwrite=True to replace"):
        patch.to_lora(tmp_path, model)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == before
    patch.to_lora(tmp_path, model, overwrite=True)
    assert relative(loaded(model, tmp_path)(**patch.bare(ids)).logits, model(ids).logits[:, -2:]) < 1e-5


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "pytorch_model.bin", "model-Q4.GGUF"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_adapter_is_never_written_beside_a_model(tmp_path, file, overwrite, monkeypatch):
    model, ids = shared("Llama", torch.float32), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    (tmp_path / file).write_text("mine")

    def fail(*_, **__):
        raise AssertionError("the edits were computed before the folder was checked")

    monkeypatch.setattr(type(patch), "joint", fail)
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(ValueError, match=rf"path is '.*', which holds a model \({file}\).*give a new or an empty"):
            patch.to_lora(path, model, overwrite=overwrite)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(file, "mine")]


def test_other_files_are_kept(tmp_path):
    model, ids = shared("Llama", torch.float32), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=r"which holds README.md: give a new or an empty folder, or overwrite=True"):
        patch.to_lora(tmp_path, model)
    with pytest.raises(ValueError, match=r"README.md is a file: give a folder"):
        patch.to_lora(tmp_path / "README.md" / "adapter", model)
    with pytest.raises(ValueError, match=r"folder is '.*', which holds README.md"):
        write_adapter(tmp_path, model, {}, {}, "")
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    patch.to_lora(tmp_path, model, overwrite=True)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_patch_does_not_keep_its_model_alive(tmp_path):
    model, ids = small_language_model("Llama", torch.float32), prompts(1)
    patch = absorb(model, ids, LENGTH - 1)
    del model
    gc.collect()
    with pytest.raises(ValueError, match=r"the model .* no longer exists: give a model with the same weights"):
        patch.to_lora(tmp_path)
    assert patch.to_lora(tmp_path, shared("Llama", torch.float32)) == tmp_path


def test_what_no_adapter_can_hold_is_refused(tmp_path):
    model, ids = shared("GPT-2"), prompts(1)
    patch = absorb(model, ids, LENGTH - 1, outer="bias")
    with pytest.raises(ValueError, match=r"transformer.h\[0\].mlp.c_proj: a LoRA adapter has no biases.*outer='down'"):
        patch.to_lora(tmp_path, model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "place"), [("Phi", r"layers\[0\]\.mlp\.fc2"), ("GPT-J", r"h\[0\]\.mlp\.fc_out")])
def test_a_token_that_occurs_twice_in_a_parallel_block(name, place):
    """The first block's MLP reads the token alone, and cannot tell its two occurrences apart."""
    model, ids = shared(name), prompts(1)
    ids[0, -1] = ids[0, -2]
    with pytest.raises(ValueError, match=rf"{place}: .*not linearly independent[^§]*equal tokens can give"):
        absorb(model, ids, LENGTH - 3, joint=True)
    own = absorb(model, ids, LENGTH - 3)
    wanted = model(ids).logits[:, -3:]
    with own.applied(model):
        assert relative(model(**own.bare(ids)).logits, wanted) < 1e-12
    one = absorb(shared("Llama"), ids, LENGTH - 3, joint=True)  # elsewhere attention has told them apart
    with one.applied(shared("Llama")):
        answer = shared("Llama")(**one.bare(ids)).logits
    assert relative(answer, shared("Llama")(ids).logits[:, -3:]) < 1e-12


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Gemma 3"])
def test_the_merged_model_is_saved_and_loaded_like_any_other(name, tmp_path):
    model, ids = shared(name, torch.float32), prompts(1)
    patch = absorb(model, ids, LENGTH - 2)
    patch.merged(model).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert relative(again(**patch.bare(ids)).logits, model(ids).logits[:, -2:]) < 1e-5


def test_an_adapted_model_is_refused(tmp_path):
    model, ids = small_language_model("Llama", torch.float32), prompts(1)
    absorb(model, ids, LENGTH - 1).to_lora(tmp_path, model)
    adapted = loaded(model, tmp_path)
    for one in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"carries an adapter already.*merge_and_unload"):
            absorb(one, ids, LENGTH - 1)


def test_a_patch_prints_in_one_line():
    model, ids = shared("GPT-2"), prompts(1)
    patch = absorb(model, ids, LENGTH - 3, outer="bias")
    edits = "mlp.c_fc [1, 3, 128, 32] of rank ≤ 1, mlp.c_proj vector [1, 3, 32]; torch.float64 on cpu)"
    start = "Patch(replaces 61 tokens of 1 prompt at 3 positions in 6 blocks; transformer.h[0]: "
    assert (repr(patch), str(patch)) == (start + edits, start + edits)
    assert repr(patch.blocks[2]) == f"BlockPatch({edits}"
    joint = repr(absorb(model, ids, LENGTH - 3, joint=True))
    assert "in 6 blocks, with one edit for all positions; " in joint
    assert "mlp.c_proj [32, 128] of rank ≤ 3" in joint


def test_the_edits_of_experts_are_counted():
    block = absorb(shared("Mixtral"), prompts(1), LENGTH - 1).blocks[0]
    assert len(block.edits) == 5  # the router, and two maps of each of the two experts that the token is sent to
    assert "mlp.experts.down_proj [32, 64] of 2 experts" in repr(block)
