"""The theorem on blocks: weights are edited, and the block's own forward pass runs."""

import copy

import numpy as np
import pytest
import torch
from cases import block_of, prompt, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from icl_lib import (
    GRU,
    ContextualBlock,
    LinearAttention,
    LowRank,
    MeanPooling,
    SoftmaxAttention,
    implicit_update,
    kept_context,
)

LAYERS = {
    "softmax": lambda dim, heads: SoftmaxAttention(dim, heads, head_dim=max(1, dim // heads)),
    "linear": lambda dim, heads: LinearAttention(dim, heads, head_dim=max(1, dim // heads)),
    "gru": lambda dim, heads: GRU(dim, dim),
    "mean": lambda dim, heads: MeanPooling(),
}


def build(layer="softmax", dim=6, heads=2, skip=False, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return block_of(LAYERS[layer](dim, heads), dim, skip).to(dtype)


CASES = st.fixed_dictionaries(
    {
        "layer": st.sampled_from(list(LAYERS)),
        "heads": st.sampled_from([1, 2, 3, 8]),
        "dim": st.integers(1, 64),
        "n": st.integers(1, 64),
        "batch": st.sampled_from([(), (1,), (3,), (2, 2)]),
        "kept": st.floats(0, 1),
        "skip": st.booleans(),
        "seed": st.integers(0, 2**20),
    }
)


@pytest.mark.slow
@settings(max_examples=1000)
@given(CASES)
def test_theorem(case):
    block = build(case["layer"], case["dim"], case["heads"], case["skip"], seed=case["seed"])
    context, query = prompt(case["n"], case["dim"], case["batch"], case["seed"])
    # The last token always goes: a GRU may have forgotten the first ones, and then no control could differ.
    keep = torch.randperm(case["n"] - 1)[: int(case["kept"] * (case["n"] - 1))].tolist()
    kept = kept_context(context, keep)
    wanted = block(context, query)

    edited = implicit_update(block, context, query, keep).apply(block)
    assert relative(edited(kept, query), wanted) <= 1e-12

    # Negative controls: the unedited block, and the edit of another context.
    assert relative(block(kept, query), wanted) > 1e-9
    other, _ = prompt(case["n"], case["dim"], case["batch"], case["seed"] + 1)
    assert relative(implicit_update(block, other, query, keep).apply(block)(kept, query), wanted) > 1e-9


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_in_every_precision(layer, skip, dtype, bound):
    block, (context, query) = build(layer, skip=skip, dtype=dtype), prompt(batch=(4,), dtype=dtype)
    update = implicit_update(block, context, query)
    assert update.weight.dtype == dtype
    wanted = block(context, query).double()
    edited = relative(update.apply(block)(context[:, :0], query).double(), wanted)
    assert edited < bound
    assert relative(block(context[:, :0], query).double(), wanted) > 3 * edited  # negative control


@pytest.mark.parametrize("skip", [False, True])
def test_one_prompt_of_a_batch(skip):
    block, (context, query) = build(skip=skip), prompt(batch=(3,))
    together, alone = implicit_update(block, context, query), implicit_update(block, context[1], query[1])
    torch.testing.assert_close(together.weight.dense()[1], alone.weight.dense(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(together[1].weight.dense(), alone.weight.dense(), rtol=1e-12, atol=1e-14)
    edited = together[1].apply(block)
    assert isinstance(edited.first_linear, nn.Linear)  # one update gives an ordinary block
    assert relative(edited(context[1, :0], query[1]), block(context, query)[1]) < 1e-13
    assert relative(edited(context[0, :0], query[0]), block(context, query)[0]) > 1e-3  # another's prompt


def test_keeping_everything_changes_nothing():
    block, (context, query) = build(), prompt()
    assert implicit_update(block, context, query, keep=range(5)).weight.norm() == 0


def test_keep_is_a_set_of_places():
    block, (context, query) = build("gru"), prompt()
    sorted_ = implicit_update(block, context, query, keep=[1, 3]).weight.dense()
    for keep in ([3, 1], (1, 3), torch.tensor([3, 1]), np.array([3, 1]), range(1, 4, 2)):
        assert torch.equal(implicit_update(block, context, query, keep=keep).weight.dense(), sorted_)
    assert not torch.equal(implicit_update(block, context, query, keep=[1, 4]).weight.dense(), sorted_)


@pytest.mark.parametrize(
    "mlp",
    [
        nn.Linear(6, 6),
        nn.Sequential(nn.Identity(), nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 6)),
        nn.Sequential(nn.Sequential(nn.Linear(6, 9, bias=False), nn.ReLU()), nn.Linear(9, 6, bias=False)),
    ],
    ids=["linear", "deep", "without biases"],
)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_any_mlp_that_begins_with_a_linear_map(mlp, skip, batch):
    block = ContextualBlock(SoftmaxAttention(6, 2), copy.deepcopy(mlp), skip).double()
    context, query = prompt(batch=batch)
    edited = implicit_update(block, context, query).apply(block)
    assert relative(edited(context[..., :0, :], query), block(context, query)) < 1e-12
    assert relative(block(context[..., :0, :], query), block(context, query)) > 1e-6  # negative control


class ZeroWithoutContext(nn.Module):
    def forward(self, context, query):
        return context.sum(-2)


CONTEXT, QUERY = prompt(batch=(2,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"context": CONTEXT[:, :0]}, "context is empty: there is nothing to turn into an edit"),
        ({"keep": [0, 5]}, r"keep\[1\] is 5: the context has tokens 0 … 4"),
        ({"keep": [-1]}, r"keep\[0\] is -1"),
        ({"keep": [1, 1]}, "keep names a token twice"),
        ({"keep": [0.0]}, r"keep\[0\] is 0.0: give indices as whole numbers"),
        ({"keep": [True, False, True, False, True]}, r"keep\[0\] is True.*mask.nonzero"),
        ({"keep": 3}, "keep is a int: give a sequence"),
        ({"query": QUERY[0]}, r"context has shape \(2, 5, 6\) and query \(6,\)"),
        ({"query": QUERY.float()}, "query.dtype is torch.float32"),
        ({"query": QUERY.to("meta")}, "query.device is meta"),
        ({"context": CONTEXT.float(), "query": QUERY.float()}, "context.dtype is torch.float32 but block's weight"),
        ({"context": CONTEXT[..., :4], "query": QUERY[..., :4]}, "query has 4 features and this layer reads 6"),
        ({"context": CONTEXT.index_fill(1, torch.tensor(2), float("nan"))}, r"a_with\[0, 0\] is nan"),
        ({"query": QUERY * float("inf")}, "a_without.* is nan"),
        (
            {"block": ContextualBlock(ZeroWithoutContext(), nn.Linear(6, 6)).double()},
            r"a_without\[0\] is zero.*Keep a token",
        ),
        ({"context": "c_1 c_2"}, "context is a str"),
        ({"keep": [torch.tensor(2), torch.tensor(2)]}, "keep names a token twice"),
        ({"keep": np.array([True, False])}, r"keep\[0\] is True"),
        ({"keep": [np.True_]}, r"keep\[0\] is True"),
        ({"keep": b"\x01"}, "keep is a bytes"),
        ({"block": nn.Linear(6, 6)}, "block is a Linear: give a ContextualBlock.*contextual_block"),
        ({"block": ContextualBlock(lambda context, query: context, nn.Linear(6, 6)).double()}, "returned .2, 5, 6."),
        ({"block": ContextualBlock(lambda context, query: None, nn.Linear(6, 6)).double()}, "returned NoneType"),
        ({"block": ContextualBlock(MeanPooling(), nn.Sequential(nn.Linear(6, 6), nn.Dropout())).double()}, "eval"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_bad_input_names_argument_place_and_remedy(arguments, says):
    block = arguments.get("block") or build()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(ValueError, match=says):
        implicit_update(**{"block": block, "context": CONTEXT, "query": QUERY, **arguments})
    after = block.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_update_must_fit_its_block():
    update = implicit_update(build(), *prompt())
    for block, says in [
        (build(dim=8), r"the update is \(24, 6\) and the block's weight \(32, 8\)"),
        (build(skip=True), "lacks a bias part and the block has skip=True"),
        (build(dtype=torch.float32), "update.dtype is torch.float64"),
    ]:
        with pytest.raises(ValueError, match=says):
            update.apply(block)


@pytest.mark.parametrize(
    ("context", "query"), [(CONTEXT, QUERY[0]), (CONTEXT, QUERY.float()), (QUERY, QUERY), ("c", QUERY)]
)
def test_a_block_checks_its_prompt(context, query):
    for layer in (MeanPooling(), lambda context, query: context.mean(-2)):
        block = ContextualBlock(layer, nn.Linear(6, 6)).double()
        with pytest.raises(ValueError, match=r"context|query"):
            block(context, query)


def test_an_update_is_applied_to_blocks_only():
    with pytest.raises(ValueError, match="block is a Linear: give a ContextualBlock"):
        implicit_update(build(), *prompt()).apply(nn.Linear(6, 24))


def test_applying_leaves_the_block_and_the_update_alone():
    block, (context, query) = build(skip=True), prompt()
    before = copy.deepcopy(block.state_dict())
    update = implicit_update(block, context, query)
    left = update.weight.left.clone()
    update.apply(block)(context[:0], query).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert torch.equal(update.weight.left, left)
    assert isinstance(update.weight, LowRank)


def test_a_map_shared_with_the_contextual_layer_keeps_its_weights_there():
    shared = nn.Linear(6, 6).double()

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.map = shared

        def forward(self, context, query):
            return self.map(context).sum(-2) + self.map(query)

    for batch in [(), (3,)]:
        block, (context, query) = ContextualBlock(Shared(), shared), prompt(batch=batch)
        edited = implicit_update(block, context, query).apply(block)
        assert relative(edited(context[..., :0, :], query), block(context, query)) < 1e-12
        assert relative(block(context[..., :0, :], query), block(context, query)) > 1e-6  # negative control


def test_an_edited_copy_is_as_trainable_as_the_block():
    block, (context, query) = build().requires_grad_(False).eval(), prompt(batch=(2,))
    for update in (implicit_update(block, context, query), implicit_update(block, context[0], query[0])):
        edited = update.apply(block)
        assert not any(parameter.requires_grad for parameter in edited.parameters())
        assert not any(module.training for module in edited.modules())


def test_an_ellipsis_picks_prompts():
    block, (context, query) = build(skip=True), prompt(batch=(2, 3))
    update = implicit_update(block, context, query)
    for index in [(..., 1), (0, ...), (slice(None), 1)]:
        edited = update[index].apply(block)
        wanted = block(context, query)[(*index, slice(None))]
        part = context[(*index, slice(None), slice(None))][..., :0, :]
        assert relative(edited(part, query[(*index, slice(None))]), wanted) < 1e-12
        assert relative(block(part, query[(*index, slice(None))]), wanted) > 1e-6  # negative control


def test_needs_the_exact_query():
    """What the theorem does not promise: the edit made for one query fails on another."""
    block, (context, query) = build(), prompt()
    _, other = prompt(seed=2)
    edited = implicit_update(block, context, query).apply(block)
    assert relative(edited(context[:0], query), block(context, query)) < 1e-12
    assert relative(edited(context[:0], other), block(context, other)) > 1e-3
