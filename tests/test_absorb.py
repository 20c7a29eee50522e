"""A context turned into weights, against copies of the model with edited weights and their ordinary forward pass."""

import copy
import itertools

import numpy as np
import pytest
import torch
from cases import lively
from torch import nn

from icl_lib import LowRank, Transformer, TransformerConfig, absorb, verify
from icl_lib.measures import relative_error
from icl_lib.models import anatomy

RTOL = 1e-12


def streams(model, sequence):
    """What each block is fed, and the stream that the last one returns."""
    stream = [model.embed(sequence)]
    for block in model.blocks:
        stream.append(block(stream[-1]))
    return stream


def by_hand(block, stream, alone):
    """B's Theorem 1 in NumPy, from the block's definition; gives ΔW_i and Δb'_i for every position."""
    config = block.config
    norm = (lambda part, t: part(t)) if config.norm == "pre" else (lambda part, t: t)

    def after_attention(tokens):
        read = block.attention.at_every_position(norm(block.norm_attention, tokens), config.causal)
        h = tokens + read if config.skip else read
        return block.norm_attention(h) if config.norm == "post" else h

    h, h_0 = after_attention(stream), after_attention(alone)
    g, f = norm(block.norm_mlp, h).detach().numpy(), norm(block.norm_mlp, h_0).detach().numpy()
    W = block.mlp[0].weight.detach().numpy()
    update = np.einsum("...ph,...pi->...phi", (g - f) @ W.T, f / (f**2).sum(-1, keepdims=True))
    return update, (h - h_0).detach().numpy()


OPTIONS = list(itertools.product([False, True], ["none", "pre", "post"], [False, True], [1, 2]))


@pytest.mark.parametrize(("skip", "norm", "causal", "hidden_layers"), OPTIONS)
def test_every_block_and_position_by_editing_weights(skip, norm, causal, hidden_layers):
    """For each block and position: a copy of the block with edited weights, fed the query's stream and nothing else."""
    model = lively(skip=skip, norm=norm, causal=causal, hidden_layers=hidden_layers)
    inputs = torch.randn(2, 6, 8).double()
    patch = absorb(model, inputs, context_length=5)
    fed = streams(model, inputs)
    for index, (block, edits) in enumerate(zip(model.blocks, patch.blocks, strict=True)):
        alone = fed[index][:, -1:]
        update, bias = by_hand(block, fed[index], alone)
        np.testing.assert_allclose(edits.weight.dense().detach().numpy(), update, rtol=1e-9, atol=1e-11)
        assert bool(edits.outer) == skip
        for prompt, position in itertools.product(range(2), range(6)):
            edited = copy.deepcopy(block)
            with torch.no_grad():
                edited.mlp[0].weight += torch.from_numpy(update[prompt, position])
                if skip:
                    edited.mlp[-1].bias += torch.from_numpy(bias[prompt, position])
            wanted = fed[index + 1][prompt, position]
            assert relative_error(edited(alone[prompt])[0], wanted).max() < 1e-11  # NumPy's order of sums is another
            assert relative_error(block(alone[prompt])[0], wanted).max() > 1e-6
        with edits.applied(block, patch.anatomy):
            assert relative_error(block(alone), fed[index + 1]).max() < RTOL


@pytest.mark.parametrize(("skip", "norm", "causal", "hidden_layers"), OPTIONS)
@pytest.mark.parametrize("reference", ["query", "self"])
@pytest.mark.parametrize("context_length", [1, 3, 5])
def test_the_whole_network_without_its_context(skip, norm, causal, hidden_layers, reference, context_length):
    model = lively(skip=skip, norm=norm, causal=causal, hidden_layers=hidden_layers)
    inputs = torch.randn(2, 6, 8).double()
    patch = absorb(model, inputs, context_length, reference)
    first = context_length if reference == "query" else 0
    wanted, bare = model(inputs)[:, first:], patch.bare(inputs)
    wanted = wanted if reference == "query" else wanted.unsqueeze(-2)
    edited = patch.merged(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in edited.modules())
    with patch.applied(model) as same:
        assert same is model
        by_factors = model(bare)
    assert relative_error(edited(bare), wanted).max() < 1e-11  # several blocks, each to 1e-12
    assert relative_error(by_factors, wanted).max() < 1e-11
    torch.testing.assert_close(by_factors, edited(bare), rtol=1e-11, atol=1e-11)
    assert relative_error(model(bare), wanted).max() > 1e-4


def test_another_prompts_patch_does_not_do():
    model, inputs, others = lively(), torch.randn(2, 6, 8).double(), torch.randn(2, 6, 8).double()
    wanted = model(inputs)[:, 5:]
    with absorb(model, others, 5).applied(model):
        assert relative_error(model(inputs[:, 5:]), wanted).max() > 1e-3


def test_a_single_edit_gives_ordinary_linear_maps():
    model, inputs = lively(), torch.randn(6, 8).double()
    edited = absorb(model, inputs, 5).merged(model)
    assert [type(module) for module in edited.modules()] == [type(module) for module in model.modules()]
    assert relative_error(edited(inputs[5:]), model(inputs)[5:]).max() < 1e-11
    difference = edited.blocks[1].mlp[0].weight - model.blocks[1].mlp[0].weight
    assert torch.linalg.matrix_rank(difference, rtol=1e-10) == 1


def test_updates_of_a_block_share_their_right_factor_and_their_sum_has_rank_one():
    model, inputs = lively(dim=5, heads=1), torch.randn(4, 9, 5).double()
    for edits in absorb(model, inputs, 8).blocks:
        assert edits.weight.right.shape == (4, 1, 5, 1)
        stacked = edits.weight.dense().flatten(1, 2)
        assert torch.linalg.matrix_rank(stacked, rtol=1e-12).tolist() == [1] * 4
        assert torch.linalg.matrix_rank(edits.weight.dense().sum(1), rtol=1e-12).tolist() == [1] * 4
        torch.testing.assert_close(edits.weight.sum(-3).dense(), edits.weight.dense().sum(1), rtol=1e-12, atol=1e-12)
        assert edits.weight.sum(-3).rank().tolist() == [1] * 4
    own = absorb(model, inputs, 8, reference="self").blocks[0].weight  # control: each has its own right factor
    assert (own.sum(-3).rank() > 1).all()


def test_a_causal_model_leaves_the_first_token_nothing_to_replace():
    """The query first: nothing before it, so its own patch changes nothing; with attention both ways it does."""
    for causal in (True, False):
        model, inputs = lively(causal=causal, norm="pre"), torch.randn(6, 8).double()
        first = absorb(model, inputs, 5, reference="self").blocks[0].at(slice(0, 1))
        size = max(first.weight.norm().item(), first.change.norm().item())
        assert size < 1e-13 if causal else size > 1e-2


def test_without_positions_and_causality_the_query_may_be_anywhere():
    """Attention both ways sees a set of tokens: a query at the front is put last, and has the same edits."""
    model, inputs = lively(causal=False), torch.randn(6, 8).double()
    query_first = inputs.roll(1, 0)
    torch.testing.assert_close(model(query_first)[0], model(inputs)[-1], rtol=1e-11, atol=1e-12)
    edits = absorb(model, inputs, 5).blocks[1].weight
    again = absorb(model, inputs[torch.tensor([4, 2, 0, 1, 3, 5])], 5).blocks[1].weight
    torch.testing.assert_close(again[5].dense(), edits[5].dense(), rtol=1e-11, atol=1e-12)
    assert (again[5] - edits[4]).norm() > 1e-3


def test_one_pass_over_the_prompt(monkeypatch):
    model, inputs = lively(), torch.randn(2, 6, 8).double()
    lengths = []
    attend = type(model.blocks[0].attention).at_every_position
    monkeypatch.setattr(
        type(model.blocks[0].attention),
        "at_every_position",
        lambda layer, sequence, causal: lengths.append(sequence.shape[-2]) or attend(layer, sequence, causal),
    )
    absorb(model, inputs, 5)
    assert lengths == [6] * 3 + [1] * 3  # the prompt, then the query alone


def test_a_token_that_layer_norm_sends_to_zero_is_outside_the_theorem():
    model = lively(norm="pre", blocks=2)
    with torch.no_grad():
        model.blocks[1].norm_mlp.weight.zero_()
        model.blocks[1].norm_mlp.bias.zero_()
    with pytest.raises(ValueError, match=r"blocks\[1\]\.mlp\.0: a_without\[0\] is zero: .*no edit of the weight"):
        absorb(model, torch.randn(6, 8).double(), 5)
    with torch.no_grad():
        model.blocks[1].norm_mlp.bias.fill_(0.5)  # γ = 0: the same whatever it reads, so there is nothing to edit
    patch = absorb(model, torch.randn(6, 8).double(), 5)
    assert patch.blocks[1].weight.norm().max() == 0
    assert patch.blocks[0].weight.norm().min() > 1e-3


def test_a_constant_stream_is_what_layer_norm_sends_to_its_bias():
    model = Transformer(TransformerConfig(dim=4, norm="pre")).double().requires_grad_(False)
    for parameter in model.blocks[0].attention.parameters():
        parameter.zero_()
    inputs = torch.randn(3, 4).double()
    inputs[-1] = 0.5  # a constant vector, and attention adds nothing to it
    with pytest.raises(ValueError, match=r"blocks\[0\]\.mlp\.0: a_without\[0\] is zero"):
        absorb(model, inputs, 2)
    model.blocks[0].norm_mlp.bias.fill_(0.1)
    patch = absorb(model, inputs, 2)
    wanted = model(inputs)
    with patch.blocks[0].applied(model.blocks[0], patch.anatomy):
        assert relative_error(model.blocks[0](inputs[2:]), wanted).max() < RTOL
    assert relative_error(model(inputs[2:]).expand(3, 4)[:2], wanted[:2]).max() > 1e-3


def untouched(model):
    """State and hooks, to be compared afterwards."""
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    hooks += ["weight" in vars(module) for module in model.modules()]
    return hooks, [parameter.clone() for parameter in model.state_dict().values()]


def same(before, after):
    return before[0] == after[0] and all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_put_back_whatever_happens(error):
    model, inputs = lively(), torch.randn(6, 8).double()
    before, answer = untouched(model), model(inputs)
    patch = absorb(model, inputs, 5)
    assert same(before, untouched(model))

    def interrupted():
        with patch.applied(model):
            assert not same(before, untouched(model))
            raise error

    with pytest.raises(error):
        interrupted()
    assert same(before, untouched(model))
    assert torch.equal(model(inputs), answer)


def test_a_failing_pass_leaves_no_hooks():
    model, inputs = lively(), torch.randn(6, 8).double()
    with torch.no_grad():
        model.blocks[2].mlp[0].weight[0, 0] = float("nan")
    before = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match=r"blocks\[2\]\.mlp\.0\.weight\[0, 0\] is nan"):
        absorb(model, inputs, 5)
    assert before == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


NAN = torch.zeros(6, 8).double()
NAN[2, 3] = float("nan")
GOOD = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": torch.sin}, "model is a builtin_function_or_method"),
        ({"model": nn.Linear(8, 8).double()}, "model is a Linear, whose anatomy is unknown"),
        ({"inputs": [[0.0]]}, "inputs is a list"),
        ({"inputs": GOOD[0]}, r"inputs has shape \(8,\)"),
        ({"inputs": GOOD.float()}, "inputs.dtype is torch.float32 but model.dtype is torch.float64"),
        ({"inputs": GOOD[:, :5]}, r"sequence has shape \(6, 5\): give"),
        ({"inputs": NAN}, r"inputs\[2, 3\] is nan"),
        ({"inputs": GOOD[:1]}, "inputs hold 1 token"),
        ({"inputs": GOOD[None][:0]}, r"inputs have shape \(0, 6, 8\), which holds no tokens"),
        ({"context_length": 0}, "context_length is 0 and inputs hold 6 tokens: at least one token must be replaced"),
        ({"context_length": 6}, "context_length is 6 .* give 1 … 5"),
        ({"context_length": -1}, "context_length is -1"),
        ({"context_length": True}, "context_length is True"),
        ({"context_length": 2.0}, "context_length is 2.0"),
        ({"reference": "token"}, "reference is 'token': choose 'query' or 'self'"),
        ({"positions": "last"}, "positions is 'last'"),
        (
            {"context_length": 3, "positions": "all"},
            "only a single query can replace every position, with an edit for each",
        ),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = {"model": lively(), "inputs": GOOD, "context_length": 5, **change}
    with pytest.raises(ValueError, match=says):
        absorb(**arguments)


def test_a_model_with_dropout_in_training_is_refused():
    model = lively(norm="pre")
    model.blocks[0].norm_attention = nn.Dropout(0.5)
    with pytest.raises(ValueError, match="eval"):
        absorb(model.train(), GOOD, 5)


def test_functional_dropout_in_training_is_refused():
    model = lively()
    model.blocks[1].attention.extra = nn.MultiheadAttention(8, 2, dropout=0.5)
    with pytest.raises(ValueError, match=r"model.blocks.1.attention.extra is a MultiheadAttention in training mode"):
        absorb(model.train(), GOOD, 5)


def test_autocast_is_refused():
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast is on"):
        absorb(lively(), GOOD, 5)


def test_a_patched_model_is_not_patched_again():
    model = lively()
    patch = absorb(model, GOOD, 5)
    with patch.applied(model):
        for again in (
            lambda: patch.applied(model).__enter__(),
            lambda: patch.merged(model),
            lambda: absorb(model, GOOD, 5),
        ):
            with pytest.raises(ValueError, match=r"is edited: leave the `with` block"):
                again()
        assert relative_error(model(GOOD[5:]), patch.merged(lively_copy(model))(GOOD[5:])).max() < RTOL


def lively_copy(patched):
    """The model that was patched, from its weights."""
    fresh = Transformer(patched.config).double()
    fresh.load_state_dict(patched.state_dict())
    return fresh


def test_a_merged_model_refuses_what_its_edits_were_not_made_for():
    model, inputs = lively(), torch.randn(2, 6, 8).double()
    edited = absorb(model, inputs, 5).merged(model)
    for wrong in (inputs, inputs[:1, 5:], inputs[0]):
        with pytest.raises(ValueError, match=r"separate weights for \(2, 1\): give inputs"):
            edited(wrong)


def test_edits_of_the_query_do_not_keep_the_others_in_memory():
    patch = absorb(lively(), torch.randn(4, 50, 8).double(), 49)
    for block in patch.blocks:
        edits = block.at(slice(-1, None))
        assert edits.weight.left.untyped_storage().nbytes() == 4 * 32 * 8
        assert edits.change.untyped_storage().nbytes() == 4 * 8 * 8


class InPlace(nn.Module):
    """A block that writes to its own input and stream."""

    def __init__(self, block):
        super().__init__()
        self.block, self.mlp = block, block.mlp

    def forward(self, stream):
        stream += self.block.attention.at_every_position(stream.clone(), causal=True)
        return stream + self.mlp(stream)


def test_blocks_that_write_to_their_input(monkeypatch):
    monkeypatch.setattr(anatomy, "_ENTRIES", dict(anatomy._ENTRIES))
    plain = lively(blocks=2)
    model = nn.Sequential(*(InPlace(block) for block in plain.blocks))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = model

        def forward(self, tokens):
            return self.blocks(tokens.clone())

    anatomy.register_anatomy(Model, anatomy.Anatomy("blocks", "mlp", ("mlp.0",), "mlp.4"))
    inputs = torch.randn(2, 6, 8).double()
    for reference in ("query", "self"):
        report = verify(Model(), inputs, 3, reference, positions="query")
        assert report.holds, report
        assert report.output_control > 1e-4


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lively(blocks=2), "model has 2 blocks and the patch 3"),
        (lively(dim=4), r"blocks\[0\]\.mlp\.0 is \(16, 4\).* and its edit is \(32, 8\)"),
        (lively().float(), "torch.float32 on cpu and its edit"),
        (lively(skip=False), "model has the anatomy .* and the patch was made for"),
    ],
)
def test_a_patch_for_another_model_is_refused(other, says):
    patch = absorb(lively(), GOOD, 5)
    with pytest.raises(ValueError, match=says):
        patch.merged(other)
    before = untouched(other)
    with pytest.raises(ValueError, match=says), patch.applied(other):
        pass
    assert same(before, untouched(other))


def test_a_patched_model_refuses_what_its_patch_was_not_made_for():
    model = lively()
    with (
        absorb(model, GOOD, 5).applied(model),
        pytest.raises(ValueError, match=r"blocks\[0\]\.mlp\.0 reads .*patch.bare"),
    ):
        model(GOOD)


def test_positions_after_the_context_alone():
    model, inputs = lively(), torch.randn(2, 6, 8).double()
    everywhere = absorb(model, inputs, 5)
    query = absorb(model, inputs, 5, positions="query")
    assert (query.first, everywhere.first) == (5, 0)
    assert query.blocks[0].weight.shape == (2, 1, 32, 8)
    for few, block in zip(query.blocks, everywhere.blocks, strict=True):
        all_ = block.at(slice(5, None))
        torch.testing.assert_close(few.weight.dense(), all_.weight.dense(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(few.outer, all_.outer, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(few.change, all_.change, rtol=1e-12, atol=1e-14)


def test_sum_is_that_of_the_dense_matrices():
    update = LowRank(torch.randn(2, 5, 4, 2).double(), torch.randn(2, 1, 3, 2).double())
    for dim in (0, 1, -3, -4):
        torch.testing.assert_close(update.sum(dim).dense(), update.dense().sum(dim), rtol=1e-12, atol=1e-12)
    for dim in (2, -1, -2, -5):
        with pytest.raises(ValueError, match=rf"dim is {dim}: .* 2 leading dimensions"):
            update.sum(dim)
