"""The transformer against a token-by-token reference."""

import itertools

import pytest
import torch
from torch.nn import functional

from icl_lib import Transformer, TransformerConfig, implicit_update


def reference(model, sequence):
    """The definition, one position at a time."""
    config = model.config
    stream = [model.embed(token) for token in sequence]
    for block in model.blocks:
        pre = config.norm == "pre"
        read = [block.norm_attention(t) if pre else t for t in stream]
        after = []
        for i, token in enumerate(stream):
            others = read[:i] if config.causal else read[:i] + read[i + 1 :]
            context = torch.stack(others) if others else read[i].new_zeros(0, len(read[i]))
            h = block.attention(context, read[i]) + (token if config.skip else 0)
            h = block.norm_attention(h) if config.norm == "post" else h
            out = block.mlp(block.norm_mlp(h) if pre else h) + (h if config.skip else 0)
            after.append(block.norm_mlp(out) if config.norm == "post" else out)
        stream = after
    return torch.stack([model.unembed(token) for token in stream])


OPTIONS = list(itertools.product([None, 8], [1, 3], [False, True], ["none", "pre", "post"], [False, True]))


@pytest.mark.parametrize(("width", "blocks", "skip", "norm", "causal"), OPTIONS)
def test_every_combination_of_options(width, blocks, skip, norm, causal):
    torch.manual_seed(0)
    config = TransformerConfig(
        dim=4, width=width, blocks=blocks, heads=2, hidden_layers=2, skip=skip, norm=norm, causal=causal
    )
    model = Transformer(config).double()
    for parameter in model.parameters():  # LayerNorm's gain and bias start at 1 and 0: hide nothing behind that
        torch.nn.init.normal_(parameter, std=0.5)
    sequence = torch.randn(5, 4).double()
    wanted = reference(model, sequence)
    torch.testing.assert_close(model(sequence), wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model(sequence[None, None])[0, 0], wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.at_query(sequence), wanted[-1], rtol=1e-11, atol=1e-12)


def test_activation():
    model = Transformer(TransformerConfig(dim=4, skip=False, activation="relu"))
    block, token = model.blocks[0], torch.randn(1, 4)
    first, _, last = block.mlp
    hidden = first(block.attention.at_every_position(token))
    torch.testing.assert_close(model(token), last(functional.relu(hidden)))
    assert not torch.allclose(model(token), last(functional.gelu(hidden)))


def test_contextual_block_shares_the_model():
    model = Transformer(TransformerConfig(dim=3, width=8, heads=2, skip=False)).double()
    block, sequence = model.contextual_block(), torch.randn(2, 6, 3).double()
    context, query = sequence[:, :-1], sequence[:, -1]
    torch.testing.assert_close(block(context, query), model(sequence)[:, -1], rtol=1e-12, atol=1e-14)
    assert {id(p) for p in block.parameters()} == {id(p) for p in model.parameters()}
    before = model.blocks[0].mlp[0].weight.clone()
    implicit_update(block, context, query).apply(block)
    assert torch.equal(model.blocks[0].mlp[0].weight, before)


@pytest.mark.parametrize(
    ("sequence", "says"),
    [
        (torch.zeros(5, 3), r"sequence has shape \(5, 3\): give \[\*batch, n, 4\]"),
        (torch.zeros(0, 4), "n ≥ 1"),
        (torch.zeros(4), r"sequence has shape \(4,\)"),
        (torch.zeros(5, 4).double(), "sequence.dtype is torch.float64"),
    ],
)
def test_bad_sequences_are_named(sequence, says):
    model = Transformer(TransformerConfig(dim=4))
    for run in (model, model.at_query):
        with pytest.raises(ValueError, match=says):
            run(sequence)


@pytest.mark.parametrize("change", [{"blocks": 2}, {"skip": True}, {"norm": "pre"}])
def test_other_models_are_not_a_contextual_block(change):
    config = TransformerConfig(**{"dim": 3, "skip": False, **change})
    with pytest.raises(ValueError, match="is a single contextual block"):
        Transformer(config).contextual_block()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 0}, "dim is 0"),
        ({"blocks": -1}, "blocks is -1"),
        ({"heads": 3}, "heads=3 does not divide the width 4"),
        ({"width": 0}, "width is 0"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"norm": "batch"}, "norm is 'batch': choose one of none, pre, post"),
        ({"activation": "tanh"}, "activation is 'tanh': choose one of gelu, relu"),
    ],
)
def test_bad_configuration_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        TransformerConfig(**{"dim": 4, **change})
