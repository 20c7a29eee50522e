"""The anatomies of models: known classes, registered ones, and entries that do not fit the model."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from icl_lib import Transformer, TransformerConfig, absorb, verify
from icl_lib.measures import relative_error
from icl_lib.models import anatomy
from icl_lib.models.anatomy import Anatomy, known_anatomy, register_anatomy, sites


@pytest.fixture(autouse=True)
def forget_entries(monkeypatch):
    monkeypatch.setattr(anatomy, "_ENTRIES", dict(anatomy._ENTRIES))


class Gated(nn.Module):
    """A block unknown to the library: the mean of the tokens so far as contextual layer, and a gated MLP."""

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


def checked(model):
    """The registered anatomy, after the check of its places."""
    anatomy = known_anatomy(model)
    sites(model, anatomy)
    return anatomy


def test_a_model_of_another_class_works_once_registered():
    model, inputs = Stack().double(), torch.randn(2, 7, 6).double()
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


class Sandwich(Gated):
    """A block with a norm after its MLP."""

    def __init__(self, width, norm):
        super().__init__(width)
        self.after = norm(width)

    def forward(self, stream):
        count = torch.arange(1, stream.shape[-2] + 1, dtype=stream.dtype).unsqueeze(-1)
        h = stream + 2 * stream.cumsum(-2) / count
        z = self.norm(h)
        return h + self.after(self.down(torch.sigmoid(self.gate(z)) * self.up(z)))


NORMS = {
    "bias": (nn.LayerNorm, ["after.bias"]),
    "scale": (lambda width: nn.LayerNorm(width, bias=False), ["after"]),
    "down": (nn.RMSNorm, ["down", "after"]),
}


@pytest.mark.parametrize("outer", NORMS)
def test_a_norm_after_the_mlp_adds_the_change(outer):
    """By its bias; by its scale alone, if it subtracts the mean; or by its scale and the map before it."""
    norm, edited_places = NORMS[outer]
    model, inputs = Stack(width=6).double().requires_grad_(False), torch.randn(2, 7, 6).double()
    model.layers = nn.ModuleList(Sandwich(6, norm) for _ in range(3)).double().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.2 * torch.randn_like(parameter)
    register_anatomy(Stack, dataclasses.replace(ENTRY, scale="after"))
    patch = absorb(model, inputs, 6)
    assert patch.outer_kind == outer
    assert list(patch.blocks[0].outer) == edited_places
    for reference in ("query", "self"):
        report = verify(model, inputs, 6, reference)
        assert report.holds, report
        assert report.output_control > 1e-3
    single = absorb(model, inputs[:1], 6, positions="query")
    edited = single.merged(model)
    assert [type(part) for part in edited.modules()] == [type(part) for part in model.modules()]
    assert relative_error(edited(single.bare(inputs[:1])), model(inputs)[:1, 6:]).max() < 1e-12
    with patch.applied(model), pytest.raises(ValueError, match=r"is edited: leave"), patch.applied(model):
        pass


def test_torchs_own_encoder_with_several_prompts():
    """In evaluation mode torch fuses a layer into one function, which reads the weights itself."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval().double().requires_grad_(False)
    inputs = torch.randn(3, 5, 8).double()
    patch, wanted = absorb(model, inputs, 4), model(inputs)[:, 4:]
    assert relative_error(patch.merged(model)(patch.bare(inputs)), wanted).max() < 1e-12
    with patch.applied(model):
        assert relative_error(model(patch.bare(inputs)), wanted).max() < 1e-12
    assert relative_error(model(patch.bare(inputs)), wanted).max() > 1e-2
    assert patch.anatomy == Anatomy("layers", "norm2", ("linear1",), "linear2")


def test_verify_fails_for_an_entry_without_one_of_the_inner_maps():
    register_anatomy(Stack, Anatomy(blocks="layers", stream="norm", inner=("up",), outer="down"))
    report = verify(Stack().double(), torch.randn(2, 7, 6).double(), 6)
    assert not report.holds
    assert report.max_error > 1e-6


def test_subclasses_are_covered():
    class Mine(Transformer):
        pass

    model = Mine(TransformerConfig(dim=4))
    assert known_anatomy(model) == known_anatomy(Transformer(model.config))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (Anatomy("blocks", "norm", ("up",), "down"), "Stack has no 'blocks'"),
        (Anatomy("layers", "norm2", ("up",), "down"), r"layers\[0\] has no 'norm2'"),
        (
            Anatomy("layers.0.norm", "norm", ("up",), "down"),
            "Stack.layers.0.norm is a RMSNorm, not a list",
        ),
        (lambda model: None, "the entry of Stack returned a NoneType: it must return an Anatomy"),
        (
            Anatomy("layers", "norm", ("norm",), "down"),
            r"layers\[0\]\.norm is a RMSNorm: it must be a linear map",
        ),
    ],
)
def test_an_entry_that_does_not_fit_is_named(entry, says):
    register_anatomy(Stack, entry)
    with pytest.raises(ValueError, match=says):
        checked(Stack())


@pytest.mark.parametrize("shared", ["block", "mlp", "linear"])
def test_shared_parts_are_refused(shared):
    model = Transformer(TransformerConfig(dim=4, blocks=2))
    first, second = model.blocks
    if shared == "block":
        model.blocks[1] = first
    elif shared == "mlp":
        second.mlp = first.mlp
    else:
        second.mlp[2] = first.mlp[2]
    with pytest.raises(ValueError, match=r"blocks\[1\]\.mlp\.[02] is the same weight as blocks\[0\]\.mlp\.[02]"):
        checked(model)
    model.blocks[1] = copy.deepcopy(model.blocks[0])
    assert checked(model).blocks == "blocks"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks": ""}, "blocks is ''"),
        ({"inner": ()}, r"inner is \(\)"),
        ({"outer": ""}, "outer is '': give a path or None"),
        ({"parallel": True}, r"inner is .*: give \(\), since the MLP of a parallel block needs no edit"),
    ],
)
def test_bad_entries_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(ENTRY, **change)


class Twofold(nn.Linear):
    def forward(self, read):
        return 2 * super().forward(read)


class Doubling(Gated):
    """The map that reads z doubles its output, which any function may do: only what it reads is restored."""

    def __init__(self, width):
        super().__init__(width)
        self.up = Twofold(width, 3 * width)


class DoublingAtTheEnd(Gated):
    """The last map doubles its output, and so the change that its edit adds."""

    def __init__(self, width):
        super().__init__(width)
        self.down = Twofold(3 * width, width)


def test_a_map_with_a_hook_is_refused():
    register_anatomy(Stack, ENTRY)
    model = Stack()
    hook = model.layers[1].down.register_forward_hook(lambda module, args, answer: 0.5 * answer)
    with pytest.raises(ValueError, match=r"layers\[1\]\.down carries a forward hook"):
        checked(model)
    hook.remove()
    assert checked(model) == ENTRY


def test_a_compiled_model_is_refused():
    register_anatomy(Stack, ENTRY)
    model = Stack()
    model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"model.layers.0 is compiled"):
        checked(model)


class WithMask(Gated):
    def forward(self, stream, mask=None):
        return super().forward(stream)


class Functional(Gated):
    def forward(self, stream):
        z = self.norm(stream)
        return stream + self.down(torch.sigmoid(nn.functional.linear(z, self.gate.weight)) * self.up(z))


class Pair(Gated):
    def forward(self, stream):
        return super().forward(stream), None


class Twice(Gated):
    def forward(self, stream):
        return super().forward(super().forward(stream))


class Unused(Gated):
    def forward(self, stream):
        return stream + self.down(self.up(self.norm(stream)))


def with_block(kind, call=None):
    """A model whose second block is of this kind."""

    class Model(Stack):
        def forward(self, tokens):
            for layer in self.layers:
                tokens = call(layer, tokens) if call and isinstance(layer, kind) else layer(tokens)
            return tokens

    register_anatomy(Model, ENTRY)
    model = Model().double()
    model.layers[1] = kind(6).double()
    return model


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        (WithMask, lambda layer, tokens: layer(tokens, mask=None)),
        (Functional, None),
        (Pair, lambda layer, tokens: layer(tokens)[0]),
        (Doubling, None),
    ],
)
def test_blocks_may_be_called_as_they_like(kind, call):
    """With keywords, by the weight alone, with a tuple as output, and with a map that doubles what it reads into."""
    report = verify(with_block(kind, call), torch.randn(5, 6).double(), 4)
    assert report.holds, report
    assert report.output_control > 1e-3


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Twice, r"layers\[1\]\.norm is called twice in one pass"),
        (Unused, r"layers\[1\]\.gate is never called"),
        (DoublingAtTheEnd, r"layers\[1\]: with its edits this block's output differs"),
    ],
)
def test_blocks_of_another_form_are_refused(kind, says):
    with pytest.raises(ValueError, match=says):
        absorb(with_block(kind), torch.randn(5, 6).double(), 4)


@pytest.mark.parametrize(("model_type", "entry"), [(Stack(), ENTRY), (int, ENTRY), (Stack, "layers"), (Stack, Anatomy)])
def test_bad_registrations_are_named(model_type, entry):
    with pytest.raises(ValueError, match=r"model_type is|entry is a (str|type)"):
        register_anatomy(model_type, entry)
