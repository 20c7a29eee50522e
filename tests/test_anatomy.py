"""Where models keep their parts: known classes, registered ones, and entries that do not fit."""

import copy

import pytest
import torch
from torch import nn

from icl_lib import Transformer, TransformerConfig, absorb, anatomy, verify
from icl_lib.anatomy import Anatomy, anatomy_of, register_anatomy


@pytest.fixture(autouse=True)
def forget_entries(monkeypatch):
    monkeypatch.setattr(anatomy, "_ENTRIES", dict(anatomy._ENTRIES))


class Gated(nn.Module):
    """Somebody's own block: a gated MLP with two inner maps, the mean of the tokens before as its contextual layer."""

    def __init__(self, width, skip=True):
        super().__init__()
        self.norm, self.skip = nn.RMSNorm(width), skip
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, stream):
        count = torch.arange(1, stream.shape[-2] + 1, dtype=stream.dtype).unsqueeze(-1)
        h = stream + 2 * stream.cumsum(-2) / count
        z = self.norm(h)
        return h + self.down(torch.sigmoid(self.gate(z)) * self.up(z))


class Stack(nn.Module):
    def __init__(self, width=6, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(Gated(width) for _ in range(depth))

    def forward(self, tokens):
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens


ENTRY = Anatomy(blocks="layers", stream="norm", inner=("gate", "up"), outer="down")


def test_somebody_elses_model_once_registered():
    model, inputs = Stack().double(), torch.randn(2, 7, 6).double()
    with pytest.raises(ValueError, match=r"model is a Stack, whose anatomy is unknown [^§]*register_anatomy\(Stack"):
        absorb(model, inputs, 6)
    register_anatomy(Stack, ENTRY)
    for reference in ("query", "self"):
        report = verify(model, inputs, 6, reference)
        assert report.holds
        assert report.output_control > 1e-3
    patch = absorb(model, inputs, 6)
    edited = patch.merged(model)
    torch.testing.assert_close(edited(patch.bare(inputs)), model(inputs)[:, 6:], rtol=1e-12, atol=1e-12)
    assert edited.layers[0].down.bias is not None  # a bias where there was none
    assert model.layers[0].down.bias is None


def test_an_entry_that_misses_an_inner_map_is_found_out_by_verify():
    register_anatomy(Stack, Anatomy(blocks="layers", stream="norm", inner=("up",), outer="down"))
    report = verify(Stack().double(), torch.randn(2, 7, 6).double(), 6)
    assert not report.holds
    assert report.max_error > 1e-6


def test_subclasses_are_covered():
    class Mine(Transformer):
        pass

    model = Mine(TransformerConfig(dim=4))
    assert anatomy_of(model) == anatomy_of(Transformer(model.config))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Anatomy("blocks", "norm", ("up",), "down"), "Stack has no 'blocks'"),
        (Anatomy("layers", "norm2", ("up",), "down"), r"layers\[0\] has no 'norm2'"),
        (Anatomy("layers", "norm", (), "down"), "inner is empty"),
        (Anatomy("layers", "norm", ("norm",), "down"), r"layers\[0\]\.norm is a RMSNorm: it must be a torch.nn.Linear"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(entry, says):
    register_anatomy(Stack, entry)
    with pytest.raises(ValueError, match=says):
        anatomy_of(Stack())


def test_a_shared_block_is_refused():
    model = Transformer(TransformerConfig(dim=4, blocks=2))
    model.blocks[1] = model.blocks[0]
    with pytest.raises(ValueError, match="more than once"):
        anatomy_of(model)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert anatomy_of(model).blocks == "blocks"


@pytest.mark.parametrize(("model_type", "entry"), [(Stack(), ENTRY), (int, ENTRY), (Stack, "layers")])
def test_bad_registrations_are_named(model_type, entry):
    with pytest.raises(ValueError, match=r"model_type is|entry is a str"):
        register_anatomy(model_type, entry)
