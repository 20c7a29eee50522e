"""A prompt compiled into one edit of each map: exact on its calibration queries, and least squares beyond."""

import pickle

import numpy as np
import peft
import pytest
import torch
import transformers
from cases import lively, relative
from language import MIXTURES, same, shared, state
from torch import nn

from icl_lib import CompiledPatch, Patch, absorb, compile_prompt
from icl_lib.models import compiler
from icl_lib.paper.experiments.language import LANGUAGE_MODELS, VOCABULARY, small_language_model

# PEFT calls a method of transformers that will have another name in its next major version.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
POST_NORM = ("Gemma 3", "OLMo 2")
N = 20


def task(*lengths):
    """A prompt and queries of these lengths, in which no token occurs twice."""
    prompt, *queries = torch.randperm(VOCABULARY).split([N, *lengths, VOCABULARY - N - sum(lengths)])
    return prompt, queries[:-1]


def prompted(model, prompt, query):
    """What the model answers to a query behind the prompt, by its own forward pass on the whole text."""
    return model(torch.cat([prompt, query])[None]).logits[:, len(prompt) :]


def error(model, patch, prompt, query, edited=None):
    """The relative error of an edited model for a query without the prompt."""
    answer = (edited or model)(**patch.bare(query)).logits[:, patch.keep :]
    return relative(answer, prompted(model, prompt, query))


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if name not in POST_NORM])
def test_it_is_exact_on_its_calibration_queries(name):
    model, (prompt, queries) = shared(name), task(2, 4, 3, 1, 3)
    before = state(model)
    patch = compile_prompt(model, prompt, queries[:4], ridge=0)
    assert same(before, state(model))
    assert isinstance(patch, Patch)
    edited = patch.merged(model)
    for query in queries[:4]:
        assert error(model, patch, prompt, query, edited) < 1e-11
        with patch.applied(model):
            assert relative(model(**patch.bare(query)).logits[:, 1:], edited(**patch.bare(query)).logits[:, 1:]) < 1e-11
        assert error(model, patch, prompt, query) > 1e-2  # without edits
    assert error(model, patch, prompt, queries[4], edited) > 1e-2  # on another query it is only a fit
    assert max(fit.error.max() for fit in patch.fits) < 1e-11


def test_it_is_exact_on_float_streams():
    model = lively(dim=24, norm="pre", heads=4)
    prompt, *queries = torch.randn(19, 24).double().split([9, 2, 4, 1, 3])
    patch = compile_prompt(model, prompt, queries[:3], keep=2, ridge=0)
    edited = patch.merged(model)
    for query in queries[:3]:
        wanted = model(torch.cat([prompt, query]))[9:]
        assert relative(edited(patch.bare(query))[2:], wanted) < 1e-9
        assert relative(model(patch.bare(query))[2:], wanted) > 1e-2
    assert relative(edited(patch.bare(queries[3]))[2:], model(torch.cat([prompt, queries[3]]))[9:]) > 1e-2


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "GPT-J", "Mixtral"])
def test_one_query_is_the_theorem(name):
    model, (prompt, [query]) = shared(name), task(3)
    patch = compile_prompt(model, prompt, [query], keep=2, ridge=0)
    theorem = absorb(model, torch.cat([prompt, query])[None], N, keep=2, joint=True)
    for ours, theirs in zip(patch.blocks, theorem.blocks, strict=True):
        assert ours.edits.keys() == theirs.edits.keys()
        for path, edit in ours.edits.items():
            wanted = theirs.edits[path].dense()
            assert (edit.dense() - wanted).norm() <= 1e-9 * wanted.norm(), path


def test_the_edits_solve_the_normal_equations():
    """Against NumPy, with a row for each token of each query; a ridge relative to the distinct rows."""
    model, (prompt, queries) = shared("Llama"), task(3, 4, 2)
    queries[1] = torch.cat([queries[0][:2], queries[1]])  # two queries that begin alike
    patch = compile_prompt(model, prompt, queries, ridge=0.3, last=3)
    reads = {}

    def read(inputs):
        mlp = model.model.layers[0].post_attention_layernorm
        hook = mlp.register_forward_hook(lambda _, args, out: reads.update(h=args[0][0], z=out[0]))
        model(**inputs) if isinstance(inputs, dict) else model(inputs)
        hook.remove()
        return reads["h"].numpy(), reads["z"].numpy()

    alone = [read(patch.bare(query)) for query in queries]
    behind = [read(torch.cat([prompt, query])[None]) for query in queries]
    places = [np.r_[0, N : N + len(query)] for query in queries]
    z_0 = np.concatenate([z for _, z in alone])
    z_c = np.concatenate([z[at] for (_, z), at in zip(behind, places, strict=True)])
    distinct = np.unique(z_0.round(9), axis=0)
    assert len(distinct) == len(z_0) - 2 - 2  # two kept tokens and a beginning of two tokens occur again
    ridge = 0.3 * np.sort((distinct**2).sum(1))[(len(distinct) - 1) // 2]
    weight = model.model.layers[0].mlp.gate_proj.weight.numpy()
    counts = np.concatenate([[1.0] * len(query) + [3.0] for query in queries])[:, None]  # the last token counts thrice
    gram = z_0.T @ (counts * z_0) + ridge * np.eye(z_0.shape[1])
    wanted = weight @ (z_c - z_0).T @ (counts * z_0) @ np.linalg.inv(gram)
    found = patch.blocks[0].inner["mlp.gate_proj"].dense().numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)
    assert patch.fits[0].conditions["mlp.gate_proj"] <= np.linalg.cond(gram) ** 0.5 * 1.001


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral"])
def test_a_guard_protects_other_texts(name):
    model, (prompt, queries) = shared(name), task(4, 4, 4)
    guard = torch.randint(VOCABULARY, (1, 4))
    free, guarded = (compile_prompt(model, prompt, queries, ridge=0.1, guard=texts) for texts in (None, list(guard)))
    harm, less = (relative(patch.merged(model)(guard).logits, model(guard).logits) for patch in (free, guarded))
    assert less < 0.97 * harm, (less, harm)
    for query in queries:  # and the edit still serves its queries
        assert error(model, guarded, prompt, query, guarded.merged(model)) < error(model, guarded, prompt, query)


def test_the_guard_is_in_the_normal_equations():
    """Against NumPy, in the first block, whose reads no edit changes."""
    model, (prompt, queries) = shared("Llama"), task(3, 4)
    guard, reads = [torch.randint(VOCABULARY, (n,)) for n in (7, 5)], []
    patch = compile_prompt(model, prompt, queries, ridge=0.3, guard=guard)
    mlp = model.model.layers[0].mlp
    hook = mlp.down_proj.register_forward_pre_hook(lambda _, args: reads.append(args[0][0]))
    norm = model.model.layers[0].post_attention_layernorm
    hooks = [hook, norm.register_forward_hook(lambda _, args, out: reads.append(out[0]))]
    for call in [patch.bare(query) for query in queries] + [{"input_ids": text[None]} for text in guard]:
        model(**call)
    for query in queries:
        model(torch.cat([prompt, query])[None])
    for one in hooks:
        one.remove()
    z = reads[::2]
    z_0 = torch.cat([z[0], z[1][1:]]).numpy()  # the kept token occurs again
    z_c = torch.cat([z[4][[0, *range(N, N + 3)]], z[5][N:]]).numpy()
    counts = np.array([2, 1, 1, 2, 1, 1, 1, 2.0])[:, None]
    g = torch.cat(z[2:4]).numpy()
    gram = z_0.T @ (counts * z_0) + 0.3 * len(z_0) / len(g) * g.T @ g
    gram += 0.3 * np.sort((z_0**2).sum(1))[(len(z_0) - 1) // 2] * np.eye(len(gram))
    wanted = mlp.up_proj.weight.numpy() @ (z_c - z_0).T @ (counts * z_0) @ np.linalg.inv(gram)
    np.testing.assert_allclose(patch.blocks[0].inner["mlp.up_proj"].dense().numpy(), wanted, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["Llama", *MIXTURES, *POST_NORM])
def test_a_fit_to_more_tokens_than_a_map_can_serve_helps(name):
    model, (prompt, queries) = shared(name), task(*[4] * 15)
    patch = compile_prompt(model, prompt, queries, ridge=0.01)
    edited = patch.merged(model)
    with_, without = (
        sum(error(model, patch, prompt, query, one) for query in queries) / len(queries) for one in (edited, None)
    )
    assert with_ < 0.8 * without, (with_, without)
    edits = [edit for block in patch.blocks for edit in block.edits.values() if len(edit.shape) == 2]
    assert max(edit.left.shape[-1] for edit in edits) <= 64
    with pytest.raises(ValueError, match=r"layers|h\[0\]"):
        compile_prompt(model, prompt, queries, ridge=0)


@pytest.mark.parametrize("name", ["Mamba", "Qwen 3.5", "MiniMax", "BitNet"])
def test_it_is_exact_where_the_prompt_cannot_be_shared(name):
    """Caches of other kinds; and for BitNet a cache that its configuration makes shorter than its attention reaches."""
    model, (prompt, queries) = small_language_model(name, blocks=4), task(2, 3)
    patch = compile_prompt(model, prompt, queries, ridge=0)
    for query in queries:
        wanted = model(torch.cat([prompt, query])[None], use_cache=False).logits[:, N:]
        with patch.applied(model):
            assert relative(model(**patch.bare(query), use_cache=False).logits[:, 1:], wanted) < 1e-11
        assert relative(model(**patch.bare(query), use_cache=False).logits[:, 1:], wanted) > 1e-2


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mistral", "Mixtral"])
def test_the_cache_and_the_batches_change_nothing(name, monkeypatch):
    model, (prompt, queries) = shared(name), task(2, 5, 3)
    patch = compile_prompt(model, prompt, queries)
    monkeypatch.setattr(compiler, "TOKENS_AT_ONCE", 1)
    alone = compile_prompt(model, prompt, queries)
    monkeypatch.setattr(compiler, "cache_name", lambda model: "no argument of the model")
    uncached = compile_prompt(model, prompt, queries)
    for other in (alone, uncached):
        for one, two in zip(patch.blocks, other.blocks, strict=True):
            for path, edit in one.edits.items():
                assert (edit.dense() - two.edits[path].dense()).norm() < 1e-9 * edit.norm(), path


def continued(model, ids, new, **call):
    """Greedy decoding by plain forward passes, each on the whole text."""
    for _ in range(new):
        token = model(**{name: part[None] for name, part in call.items()}, input_ids=ids[None]).logits[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
        call = {name: torch.cat([part, part[-1:] + (name == "position_ids")]) for name, part in call.items()}
    return ids[-new:]


def test_the_merged_model_continues_in_step_with_the_prompted_one():
    """For 20 tokens with the answer among the calibration tokens; without it, only the first token is served."""
    model, (prompt, queries) = shared("Qwen 3"), task(3, 2)
    answers = [continued(model, torch.cat([prompt, query]), new) for query, new in zip(queries, (20, 3), strict=True)]
    served = [answer[:-1] for answer in answers]
    patch, short = (compile_prompt(model, prompt, queries, ridge=0, answers=given) for given in (served, None))
    call = {name: part[0] for name, part in patch.bare(queries[0]).items()}
    ids = call.pop("input_ids")
    assert torch.equal(continued(patch.merged(model), ids, 20, **call), answers[0])
    found = continued(short.merged(model), ids, 20, **call)
    assert found[0] == answers[0][0]
    assert not torch.equal(found, answers[0])


def test_positions_that_generate_counts_by_itself():
    model, (prompt, queries) = shared("GPT-2"), task(3, 2)
    patch = compile_prompt(model, prompt, queries, ridge=0, start=1)
    assert patch.bare(queries[1])["position_ids"].tolist() == [[0, 1, 2]]
    text = torch.cat([prompt[:1], queries[1]])[None]
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    written = patch.merged(model).generate(text, attention_mask=torch.ones_like(text), **options)[0, -1]
    assert written == prompted(model, prompt, queries[1])[0, -1].argmax()
    assert relative(patch.merged(model)(text).logits[:, 1:], prompted(model, prompt, queries[1])) < 1e-11


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mixtral"])
def test_the_adapter_and_the_saved_model_are_the_patch(name, tmp_path):
    model, (prompt, queries) = shared(name, torch.float32), task(3, 2, 4)
    patch = compile_prompt(model, prompt, queries[:2], rank=4)
    assert max(edit.left.shape[-1] for block in patch.blocks for edit in block.edits.values()) == 4
    call = patch.bare(queries[2])
    with patch.applied(model):
        wanted = model(**call).logits
    assert relative(model(**call).logits, wanted) > 1e-2
    patch.to_lora(tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_config(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    assert relative(peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")(**call).logits, wanted) < 1e-5
    patch.merged(model).save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert relative(loaded(**call).logits, wanted) < 1e-5


def test_a_rank_is_the_best_of_its_rank():
    """Less of it fits worse, and all of it is the fit; the singular values of all edits can be seen."""
    model, (prompt, queries) = shared("Llama"), task(3, 2, 4)
    errors = [compile_prompt(model, prompt, queries, ridge=0.1, rank=rank).fits[0].error.norm() for rank in (1, 3, 6)]
    assert errors[0] > errors[1] > errors[2]
    full, all_ = (compile_prompt(model, prompt, queries, ridge=0.1, rank=rank) for rank in (None, 100))
    torch.testing.assert_close(full.blocks[3].weight.dense(), all_.blocks[3].weight.dense(), rtol=1e-9, atol=1e-11)
    values = full.singular_values()[3]["mlp.up_proj"]
    torch.testing.assert_close(values[0], torch.linalg.matrix_norm(full.blocks[3].inner["mlp.up_proj"].dense(), 2))


def test_the_patch_says_what_it_is_and_can_be_kept():
    model, (prompt, queries) = shared("Llama"), task(3, 2)
    patch = pickle.loads(pickle.dumps(compile_prompt(model, prompt, queries, ridge=0)))
    assert isinstance(patch, CompiledPatch)
    assert str(patch).startswith(
        "CompiledPatch(replaces 19 tokens of a prompt, behind 1 kept, exactly for 2 queries, in "
    )
    assert error(model, patch, prompt, queries[0], patch.merged(model)) < 1e-11
    assert "fitted to 2 queries" in str(compile_prompt(model, prompt, queries))


def test_queries_may_begin_with_the_first_token_of_the_prompt_if_more_is_kept():
    """As every message of a chat does. A model that embeds positions tells the two apart in any case."""
    prompt, queries = torch.tensor([1, 5, 6, 7]), [torch.tensor([1, 8, 9]), torch.tensor([1, 9])]
    for name, keep in (("Llama", 2), ("GPT-2", 1)):
        model = shared(name)
        patch = compile_prompt(model, prompt, queries, keep=keep, ridge=0)
        assert error(model, patch, prompt, queries[0], patch.merged(model)) < 1e-9
    stream = torch.randn(6, 8).double()
    with pytest.raises(ValueError, match=r"keep is 1, and queries\[0\] begins with the kept token.*keep=2"):
        compile_prompt(lively(), stream, [torch.cat([stream[:1], torch.randn(2, 8).double()])])


def test_a_model_that_is_not_causal_is_refused():
    with pytest.raises(ValueError, match="needs a causal model"):
        compile_prompt(lively(causal=False), torch.randn(5, 8).double(), [torch.randn(2, 8).double()])


PROMPT, QUERIES = torch.arange(6), [torch.tensor([7, 8]), torch.tensor([9])]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"queries": []}, r"queries is a list of length 0: give a list of one or more tensors, each \[m\]"),
        ({"queries": torch.arange(3)}, r"queries is a tensor \[3\]"),
        ({"queries": [QUERIES[0], QUERIES[0][:0]]}, r"queries\[1\] is a tensor \[0\] .* at least one token"),
        ({"queries": [QUERIES[0].float()]}, r"queries\[0\] is a tensor \[2\] of torch.float32"),
        ({"queries": [*QUERIES, QUERIES[0]], "ridge": 0}, r"queries\[2\] is queries\[0\] again: remove one"),
        ({"queries": [torch.arange(7, 90).repeat(2)]}, r"queries\[0\].*inputs hold 172 tokens: .* positions for 128"),
        ({"queries": [torch.tensor([7, 97])]}, r"queries\[0\].* is 97: this model has the tokens 0 … 96"),
        ({"prompt": PROMPT[:0]}, "prompt is a tensor .* at least one token"),
        ({"prompt": [1, 2]}, "prompt is a list of length 2"),
        ({"queries": [PROMPT[:2].flip(0), PROMPT[:1]]}, r"keep is 1, and queries\[1\] begins with the kept .* keep=2"),
        ({"keep": 6}, r"keep is 6 and the context has 6 token\(s\)"),
        ({"guard": []}, r"guard is a list of length 0"),
        ({"guard": [torch.tensor([97])]}, "is 97: this model has the tokens"),
        ({"guard": QUERIES, "ridge": 0}, "guard is given with ridge=0"),
        ({"ridge": -1.0}, r"ridge is -1\.0"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"rank": 0}, "rank is 0"),
        ({"last": 0.0}, r"last is 0\.0"),
        ({"start": 0}, "start is 0: give a whole number of at least 1"),
        ({"answers": [QUERIES[0]]}, "answers are 1 and queries 2"),
        ({"outer": "bias"}, "2 vectors|3 vectors|4 vectors"),
    ],
)
def test_bad_arguments_are_named(arguments, says):
    model = shared("Llama")
    before = state(model)
    with pytest.raises(ValueError, match=says):
        compile_prompt(**{"model": model, "prompt": PROMPT, "queries": QUERIES, **arguments})
    assert same(before, state(model))


def test_a_model_without_an_anatomy_is_refused():
    class Odd(nn.Module):
        def forward(self, input_ids):
            return nn.functional.one_hot(input_ids, 10).double()

        def get_input_embeddings(self):
            return nn.Embedding(10, 2)

    with pytest.raises(ValueError, match="whose anatomy is unknown"):
        compile_prompt(Odd(), PROMPT, QUERIES)
