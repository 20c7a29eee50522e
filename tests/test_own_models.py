"""Models in other forms than those of Hugging Face, and what is said where a model or its inputs do not fit."""

from __future__ import annotations

import pytest
import torch
from cases import relative
from torch import nn

from icl_lib import Anatomy, ContextualBlock, absorb, greedy_agreement, implicit_update, probe, register_anatomy, verify

TOKENS, WIDTH, LENGTH = 20, 8, 9


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x):
        later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)
        z = self.ln_1(x)
        x = x + self.attn(z, z, z, attn_mask=later, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """The form of nanoGPT: ids are called idx, and without targets only the last token has logits."""

    def __init__(self) -> None:
        super().__init__()
        self.wpe, self.wte = nn.Embedding(16, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(WIDTH, TOKENS)

    def forward(self, idx, targets=None):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        if targets is None:
            return self.lm_head(x[:, [-1]]), None
        logits = self.lm_head(x)
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class LastLogitOnly(NanoGPT):
    def forward(self, idx):
        return super().forward(idx)


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class WrongPlaces(Streams):
    """The places exist, but `ln_1` reads the stream before attention."""


register_anatomy(WrongPlaces, Anatomy("blocks", stream="ln_1", inner=("mlp.0",), outer="mlp.2"))


@pytest.fixture
def gpt():
    torch.manual_seed(0)
    return NanoGPT().double().eval(), torch.randint(TOKENS, (3, LENGTH))


def test_a_model_in_the_form_of_nanogpt(gpt):
    model, ids = gpt
    report = verify(model, ids, context_length=LENGTH - 2)
    assert report.holds
    assert report.output_control > 1e-2
    patch = absorb(model, ids[:1], context_length=LENGTH - 2)
    assert set(patch.bare(ids)) == {"idx"}
    prompted = model(ids[:1])[0]
    with torch.no_grad(), patch.applied(model):
        assert relative(model(**patch.bare(ids[:1]))[0], prompted) < 1e-12
    assert relative(patch.merged(model)(**patch.bare(ids[:1]))[0], prompted) < 1e-12
    assert relative(model(**patch.bare(ids[:1]))[0], prompted) > 1e-2


def test_what_is_said_of_a_model_of_tokens_that_does_not_fit(gpt):
    model, ids = gpt
    with pytest.raises(ValueError, match=r"inputs\[2, 1\] is 20: this model has the tokens 0 … 19"):
        verify(model, ids.index_put((torch.tensor(2), torch.tensor(1)), torch.tensor(TOKENS)), LENGTH - 2)
    with pytest.raises(ValueError, match="takes no key-value cache"):
        greedy_agreement(model, ids)
    with pytest.raises(ValueError, match=r"inputs is None: give NanoGPT a float stream .* or token ids"):
        probe(model)
    with pytest.raises(ValueError, match=r"logits of 1 token\(s\), and those of 2 are compared"):
        verify(LastLogitOnly().double().eval(), ids, LENGTH - 2)
    assert verify(LastLogitOnly().double().eval(), ids, LENGTH - 1).holds


def test_a_failed_identity_names_the_places_that_are_wrong():
    model, inputs = WrongPlaces().double().eval(), torch.randn(LENGTH, WIDTH).double()
    report = verify(model, inputs, context_length=LENGTH - 1)
    assert not report.holds
    assert "stream='ln_1'" in report.cause
    assert "probing finds Anatomy(blocks='blocks', stream='ln_2'" in str(report)
    assert report.cause.split(":")[-1] in report._repr_html_()
    assert verify(Streams().double().eval(), inputs, context_length=LENGTH - 1, tolerance=1e-30).cause == ""


def test_a_stream_of_another_width_is_named():
    known, inputs = WrongPlaces().double().eval(), torch.randn(LENGTH, WIDTH + 1).double()
    for model in (known, Streams().double().eval()):
        with pytest.raises(ValueError, match=r"does not run on (the )?inputs.*expected input with shape \[\*, 8\]"):
            absorb(model, inputs, context_length=LENGTH - 1)


def test_a_layer_that_is_not_called_with_context_and_query_is_named():
    mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    block = ContextualBlock(nn.MultiheadAttention(4, 2), mlp)
    with pytest.raises(ValueError, match=r"does not run as layer\(context, query\) with \[7, 4\] and \[4\]: .*'value'"):
        implicit_update(block, torch.randn(7, 4), torch.randn(4))


def test_the_edits_of_a_block_and_of_a_model_have_the_same_names():
    model, inputs = Streams().double().eval(), torch.randn(LENGTH, WIDTH).double()
    (by_bias, *_), (by_matrix, *_) = (absorb(model, inputs, LENGTH - 1, outer=o).blocks for o in ("bias", "down"))
    assert by_bias.bias is by_bias.outer["mlp.2"]
    assert by_bias.at(slice(1)).bias.shape == (1, WIDTH)
    assert by_matrix.bias is None
    assert by_bias.weight.shape == by_matrix.weight.shape == (LENGTH, 16, WIDTH)
