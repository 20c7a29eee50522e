"""Kept tokens stay in front of the query: the edits replace only the tokens between them and the query."""

import pytest
import torch
from cases import lively, relative
from language import LENGTH, prompts, same, shared, state

from icl_lib import absorb, greedy_agreement, verify
from icl_lib.paper.experiments.language import LANGUAGE_MODELS

POST_NORM = ("Gemma 3", "OLMo 2")


@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_query_behind_kept_tokens_answers_as_after_the_whole_prompt(name, keep):
    model, ids = shared(name), prompts(1)
    before, wanted = state(model), model(ids).logits
    tokens = torch.tensor([*range(keep), LENGTH - 3, LENGTH - 2, LENGTH - 1])
    own = absorb(model, ids, LENGTH - 3, keep=keep)
    call = own.bare(ids)
    assert call["input_ids"].tolist() == ids[:, tokens].tolist()
    assert call["position_ids"].tolist() == [tokens.tolist()]
    assert relative(model(**call).logits[:, keep:], wanted[:, -3:]) > 1e-2  # the control keeps the same tokens
    with own.applied(model):
        assert relative(model(**call).logits, wanted[:, tokens]) < 1e-12
    bound = 1e-6 if name in POST_NORM else 1e-12  # as without kept tokens: a norm computes in float32
    one = absorb(model, ids, LENGTH - 3, keep=keep, joint=True)
    for edited in (one.merged(model), own.merged(model)):
        assert relative(edited(**call).logits, wanted[:, tokens]) < bound
    assert same(before, state(model))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral", "OLMo 2", "Phi"])
def test_the_edits_of_kept_tokens_are_zero(name):
    patch = absorb(shared(name), prompts(1), LENGTH - 2, keep=2)
    for block in patch.blocks:
        for sizes in block.norms():
            assert sizes.shape == (1, 4)
            assert sizes[:, :2].max() < (1e-6 if name in POST_NORM else 1e-11)
    assert max(sizes[:, 2:].max() for sizes in block.norms()) > 1e-2


def test_a_jump_of_positions_needs_its_mask():
    """Without the mask of ones (and without a cache), transformers takes the kept token for another text."""
    model, ids = shared("Llama"), prompts(1)
    patch = absorb(model, ids, LENGTH - 3, keep=1)
    call, edited = patch.bare(ids), patch.merged(model)
    assert call.pop("attention_mask").tolist() == [[1, 1, 1, 1]]
    wanted = model(ids).logits[:, -3:]
    assert relative(edited(**call, use_cache=False).logits[:, 1:], wanted) > 1e-2


@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_verification_says_what_is_kept(name):
    model, ids = shared(name), prompts(2)
    report = verify(model, ids, LENGTH - 2, keep=1)
    assert report.holds, report
    assert (report.keep, report.tested, len(report.error[0]), len(report.control[0])) == (1, 1, 2, 2)
    assert report.output_control > 1e-2
    assert "kept in front: the first token\n" in str(report)
    assert report.to_dict()["keep"] == 1
    assert "kept" not in str(verify(model, ids, LENGTH - 2))
    assert "of 2 prompts, behind 1 kept, at 2 positions in 6 blocks" in str(absorb(model, ids, LENGTH - 2, keep=1))


@pytest.mark.parametrize("causal", [True, False])
def test_a_float_stream_keeps_tokens_too(causal):
    """Without a causal mask a kept token reads the others, and its edits are not zero; the identity holds as well."""
    model, inputs = lively(norm="pre", causal=causal), torch.randn(2, 9, 8).double()
    patch = absorb(model, inputs, 8, keep=2)
    assert torch.equal(patch.bare(inputs), inputs[:, [0, 1, 8]])
    wanted = model(inputs)[:, [0, 1, 8]]
    with patch.applied(model):
        assert relative(model(patch.bare(inputs)), wanted) < 1e-12
    assert relative(patch.merged(model)(patch.bare(inputs)), wanted) < 1e-12
    assert relative(model(patch.bare(inputs))[:, 2:], wanted[:, 2:]) > 1e-2
    assert verify(model, inputs, 8, keep=2).holds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"keep": 5}, r"keep is 5 and the context has 5 token\(s\): give .*, 0 … 4"),
        ({"keep": -1}, "keep is -1"),
        ({"keep": True}, "keep is True"),
        ({"keep": 1.0}, r"keep is 1\.0"),
        ({"keep": 1, "reference": "self"}, "so give reference='query'"),
        ({"keep": 1, "attention_mask": torch.ones(1, 9).long()}, "no attention_mask"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    model = shared("Llama")
    before = state(model)
    for function in (absorb, verify):
        with pytest.raises(ValueError, match=says):
            function(model, prompts(1, length=9), 5, **arguments)
    assert same(before, state(model))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "OLMo 2", "Phi", "GPT-2"])
def test_text_is_written_behind_kept_tokens(name):
    model, ids = shared(name, torch.float32), prompts(3, length=12)
    found = greedy_agreement(model, ids, max_new_tokens=8, keep=2)
    assert (found.share, found.error < 1e-5) == (1, True), found
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    assert torch.equal(found.tokens, written[:, 12:])
    # The control reads the kept tokens and the current one, in a call of its own.
    alone = absorb(model, written[:, :13], 12, keep=2).bare(written[:, :13])
    assert torch.equal(found.without_context[:, 1], model(**alone).logits[:, -1].argmax(-1))
    assert found.control < 0.8
    with pytest.raises(ValueError, match=r"keep is 11 and the context has 11 token.*0 … 10"):
        greedy_agreement(model, ids, keep=11)
