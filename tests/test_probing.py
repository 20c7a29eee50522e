"""Anatomies that are found by running a model, with no entry registered: whole models, options, refusals."""

import re

import pytest
import torch
from language import same, state
from torch import nn

from icl_lib import Transformer, TransformerConfig, absorb, verify
from icl_lib.models import anatomy
from icl_lib.models.absorb import anatomy_of
from icl_lib.models.anatomy import Anatomy, known_anatomy
from icl_lib.models.probing import probe
from icl_lib.paper.experiments.architectures import (
    LANGUAGE_MODELS,
    MORE_LANGUAGE_MODELS,
    NARROW,
    VOCABULARY,
    small_language_model,
)

REGISTERED = dict(anatomy.ARCHITECTURES), dict(anatomy._ENTRIES)
TOKENS = 10


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch):
    monkeypatch.setattr(anatomy, "ARCHITECTURES", {})
    monkeypatch.setattr(anatomy, "_ENTRIES", {})


def relative(one, other):
    return float((one - other).norm() / other.norm())


def registered(model, monkeypatch):
    """The anatomy that is registered for a model."""
    with monkeypatch.context() as patch:
        patch.setattr(anatomy, "ARCHITECTURES", REGISTERED[0])
        patch.setattr(anatomy, "_ENTRIES", REGISTERED[1])
        return known_anatomy(model)


def by_block(model, found):
    """The anatomy of each block, whatever the order of the inner maps and of the chain."""
    kinds = [found.of(block) for block in model.get_submodule(found.blocks)]
    return [(kind.stream, set(kind.inner), kind.outer, kind.scale, kind.parallel) for kind in kinds]


FEW = ("GPT-2", "OPT, post-norm", "Phi", "Gemma 3", "Qwen 3 MoE", "Granite", "Gemma 4", "DeepSeek V3", "Mamba", "AFMoE")
ALL = [
    name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
    for name in LANGUAGE_MODELS | MORE_LANGUAGE_MODELS
]


@pytest.mark.parametrize("name", ALL)
def test_the_edits_of_an_unknown_language_model_are_exact(name, capsys):
    dtype = torch.float32 if NARROW.get(name) == "all" else torch.float64
    model = small_language_model(name, dtype, blocks=4 if name == "Nemotron-H" else 2)
    ids = torch.randperm(VOCABULARY)[None, :TOKENS]
    before, generator = state(model), torch.get_rng_state()
    report = verify(model, ids, TOKENS - 1)
    assert report.holds, report
    assert report.output_control > 1e-2
    patch = absorb(model, ids, TOKENS - 1)
    bare = {**patch.bare(ids), "use_cache": False}
    wanted = model(input_ids=ids, use_cache=False).logits[:, -1:]
    exact = 1e-5 if name in NARROW or name == "RecurrentGemma" else 1e-12  # its recurrence computes in float32
    assert relative(patch.merged(model)(**bare).logits, wanted) < exact
    assert relative(model(**bare).logits, wanted) > 1e-2
    assert same(before, state(model))
    assert torch.equal(generator, torch.get_rng_state())
    said = capsys.readouterr().err
    assert eval(said[said.index("Anatomy(") : said.rindex(")")], {"Anatomy": Anatomy}) == anatomy_of(model)


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "Doge", "Gemma 4", "LFM 2 MoE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_found_is_what_is_registered(name, dtype, monkeypatch):
    model = small_language_model(name, dtype, blocks=2)
    found = probe(model)
    assert by_block(model, found) == by_block(model, registered(model, monkeypatch))
    assert eval(repr(found)) == found


@pytest.mark.parametrize("hidden_layers", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("skip", [True, False])
def test_the_small_transformer_in_all_its_options(skip, norm, causal, hidden_layers, monkeypatch):
    config = TransformerConfig(8, blocks=2, heads=2, skip=skip, norm=norm, causal=causal, hidden_layers=hidden_layers)
    model, inputs = Transformer(config).double(), torch.randn(2, 7, 8).double()
    found, known = probe(model, inputs), registered(model, monkeypatch)
    assert (found.blocks, found.inner, found.outer) == (known.blocks, known.inner, known.outer)
    assert skip is False or found == known  # without a skip connection, h may be read behind the norm of the attention
    report = verify(model, inputs, 6)
    assert report.holds, report
    assert report.output_control > 1e-5


@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_of_torch(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, norm_first=norm_first, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).double().eval()
    inputs = torch.randn(2, 7, 8).double()
    expected = Anatomy("layers", "norm2" if norm_first else "linear1", ("linear1",), "linear2")
    assert probe(encoder, inputs) == probe(encoder, inputs[0]) == expected
    assert verify(encoder, inputs, 6, positions="query").holds


class Attention(nn.Module):
    """Causal attention with one head; its last map is a product in its forward pass, or a module."""

    def __init__(self, width, last_map=False):
        super().__init__()
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width) if last_map else nn.Identity()

    def forward(self, stream):
        query, key, value = self.read(stream).chunk(3, -1)
        return self.write(nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)

    def forward(self, z):
        return self.down(self.act(self.up(z)))


class Block(nn.Module):
    """A pre-norm block; other blocks differ in their second half."""

    def __init__(self, width=8, last_map=False):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention, self.mlp = Attention(width, last_map), MLP(width)
        self.weigh = 0.3
        self.weights = nn.Parameter(torch.rand(width) + 0.5)
        self.act, self.beside = nn.Tanh(), nn.Linear(width, width)

    def forward(self, stream):
        return self.after(stream + self.attention(self.norm_1(stream)))

    def after(self, h):
        return h + self.mlp(self.norm_2(h))


class Stack(nn.Module):
    def __init__(self, kind=Block, depth=2, **options):
        super().__init__()
        self.layers = nn.ModuleList(kind(**options) for _ in range(depth))

    def forward(self, stream):
        for layer in self.layers:
            stream = layer(stream)
        return stream


def stack(after=Block.after, **options):
    """A model whose blocks end in this way."""
    kind = type("Other", (Block,), {"after": after})
    return Stack(kind, **options).double().eval()


def prompt():
    return torch.randn(1, 6, 8).double()


PLAIN = Anatomy("layers", "norm_2", ("mlp.up",), "mlp.down")


@pytest.mark.parametrize(
    ("after", "fields"),
    [
        (lambda b, h: h + b.mlp(b.norm_2(h)), {}),
        (lambda b, h: h + 0.7 * b.mlp(b.norm_2(h)), {"multiplier": pytest.approx(0.7)}),
        (lambda b, h: 0.3 * h + b.mlp(b.norm_2(h)), {"skip_multiplier": "weigh"}),
        (lambda b, h: b.weights * h + 0.3 * b.mlp(b.norm_2(h)), {"skip_multiplier": "weights", "multiplier": "weigh"}),
        (lambda b, h: b.norm_1(h + b.mlp(b.norm_2(h))), {}),
        (lambda b, h: h + b.beside(b.act(b.mlp(b.norm_2(h)))), {"outer": "beside"}),
        (lambda b, h: h + b.mlp(b.beside(b.norm_2(h))), {"inner": ("beside",)}),
        (lambda b, h: h + b.mlp(b.norm_2(h)) + b.act(b.beside(h)), {"inner": ("mlp.up", "beside")}),
        (lambda b, h: b.mlp(b.norm_2(h)), {"outer": None}),
    ],
)
def test_what_the_block_does_after_attention_is_measured(after, fields):
    model, inputs = stack(after), prompt()
    found = probe(model, inputs)
    expected = {name: getattr(PLAIN, name) for name in ("stream", "inner", "outer", "multiplier", "skip_multiplier")}
    assert {name: getattr(found, name) for name in expected} == expected | fields
    report = verify(model, inputs, 5)
    assert report.holds, report
    assert report.output_control > 1e-5


REFUSED = {
    "a branch beside the maps": (
        lambda b, h: h + b.mlp(b.norm_2(h)) + b.act(b.norm_2(h)),
        r"layers\[0\]: the stream that norm_2 reads goes on past mlp\.up, and not only through a skip "
        r"connection: act reads it and is not a linear map",
    ),
    "a branch that multiplies": (
        lambda b, h: h + b.mlp.down(b.mlp.up(z := b.norm_2(h)) * b.act(z).repeat(1, 1, 3)),
        r"mlp\.down adds to the stream, but .* not only through mlp\.up: act reads it",
    ),
    "a function": (
        lambda b, h: h + b.mlp(b.norm_2(h)) + torch.tanh(b.norm_2(h)),
        r"a function in its forward pass reads it and is not a linear map",
    ),
    "no linear map at the end": (
        lambda b, h: h + torch.tanh(b.mlp(b.norm_2(h))),
        r"neither what a linear map returns nor a norm of that",
    ),
    "a vector of no name": (
        lambda b, h: torch.linspace(0.5, 2, 8).to(h) * h + b.mlp(b.norm_2(h)),
        r"multiplied by a vector that is no parameter of the block",
    ),
    "the other tokens again": (
        lambda b, h: b.attention(h := h + b.mlp(b.norm_2(h))) + h,
        r"depends on the other positions, too",
    ),
    "a map that is called twice": (
        lambda b, h: h + b.mlp.down(b.mlp.act(b.mlp.up(b.norm_2(h)) + b.mlp.up(2 * b.norm_2(h)))),
        r"mlp\.down adds to the stream, but .* not only through linear maps: mlp\.up is called twice",
    ),
    "a part of the tokens": (
        lambda b, h: torch.cat([h[:, :2], h[:, 2:] + b.mlp(b.norm_2(h[:, 2:]))], 1),
        r"no linear map|reads a part of the tokens",
    ),
    "no context": (
        lambda b, h: b.norm_2(h.detach() * 0 + 1),
        r"what the blocks return at the last position does not depend on the other positions",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_theorem_does_not_cover_is_refused_with_the_reason(name):
    after, reason = REFUSED[name]
    model = stack(after)
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=reason):
        probe(model, prompt())
    assert same(before, state(model))
    generator_after = torch.get_rng_state()
    prompt()
    assert not torch.equal(generator, generator_after)  # the prompt is drawn here, and nothing else
    with pytest.raises(ValueError, match=reason):
        absorb(model, prompt(), 5)


@pytest.mark.parametrize("name", ["a branch beside the maps", "a branch that multiplies", "no linear map at the end"])
def test_the_last_map_of_the_attention_holds_back_what_the_mlp_cannot_take(name):
    model, inputs = stack(REFUSED[name][0], last_map=True), prompt()
    assert probe(model, inputs) == Anatomy("layers", "attention", ("attention.write",), None)
    report = verify(model, inputs, 5, positions="query")
    assert report.holds, report
    assert report.output_control > 1e-5


def test_blocks_of_several_kinds():
    model, inputs = Stack(depth=3).double(), prompt()
    model.layers[1].mlp = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    found = probe(model, inputs)
    assert [found.of(layer).inner for layer in model.layers] == [("mlp.up",), ("mlp.0",), ("mlp.up",)]
    assert verify(model, inputs, 5, positions="query").holds
    model.layers[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"layers\[1\]: "):
        probe(model, inputs)


def test_blocks_that_one_anatomy_cannot_tell_apart():
    model = stack(lambda b, h: h + b.factor * b.mlp(b.norm_2(h)))
    for factor, layer in enumerate(model.layers, 2):
        layer.factor = torch.tensor(factor, dtype=torch.float64).item() if factor == 2 else [float(factor)][0]
    assert probe(model, prompt()).multiplier == "factor"
    for factor, layer in enumerate(model.layers, 2):
        layer.factor = factor  # an integer is no multiplier that has a name
    with pytest.raises(ValueError, match=r"layers: blocks with the same places need different anatomies: Anatomy\("):
        probe(model, prompt())


def test_a_model_without_a_list_of_blocks():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.only = Block()

        def forward(self, stream):
            return self.only(stream)

    with pytest.raises(ValueError, match="One has no list of blocks"):
        probe(One().double(), prompt())
    assert probe(Stack(depth=1).double(), prompt()) == PLAIN


def test_the_list_with_the_most_parameters_is_the_list_of_blocks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.front, self.back = Stack(depth=1), Stack(depth=2)

        def forward(self, stream):
            return self.back(self.front(stream))

    assert probe(Two().double(), prompt()).blocks == "back.layers"


def test_a_block_that_keeps_a_state_is_refused():
    class Counting(Block):
        count = 0.0

        def after(self, h):
            self.count += 1
            return super().after(h) + self.count

    with pytest.raises(
        ValueError, match=r"layers\[0\] does not return the same .*: it keeps a state or draws at random"
    ):
        probe(Stack(Counting).double(), prompt())


def test_a_block_in_16_bits_runs_as_a_copy_in_float32_where_it_can():
    seen = []

    class Noting(Block):
        narrow_only = False

        def after(self, h):
            seen.append(h.dtype)
            if self.narrow_only and h.dtype == torch.float32:
                raise RuntimeError("this kernel is for 16 bits")
            return super().after(h)

    model, inputs = Stack(Noting).bfloat16(), prompt().bfloat16()
    assert probe(model, inputs) == PLAIN
    assert seen.count(torch.bfloat16) == len(model.layers)  # the run of the whole model
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    seen.clear()
    Noting.narrow_only = True
    assert probe(model, inputs) == PLAIN
    assert seen.count(torch.float32) == len(model.layers)  # tried once for each block


def test_numbers_that_are_not_finite_are_named():
    model = Stack().double()
    with torch.no_grad():
        model.layers[1].mlp.up.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\[1\] .*: it returns NaN or infinity"):
        probe(model, prompt())


def test_what_a_model_needs_to_be_probed():
    with pytest.raises(ValueError, match=r"inputs is None: give Stack a float stream \[\*batch, n, dim\]"):
        probe(Stack().double())
    with pytest.raises(ValueError, match=r"inputs have shape \(1, 1, 8\): give two tokens or more"):
        probe(Stack().double(), prompt()[:, :1])
    assert probe(Stack().double(), prompt()[:, :2]) == PLAIN


def test_the_model_is_left_as_it_was():
    model = small_language_model("Mixtral", blocks=2).requires_grad_(True)
    model.set_experts_implementation("grouped_mm")
    implementation = model.get_experts_implementation()
    before, generator = state(model), torch.get_rng_state()
    probe(model)
    assert same(before, state(model))
    assert model.get_experts_implementation() == implementation != "eager"
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.is_grad_enabled()


def test_experts_in_a_list_of_modules_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(8, 2), nn.ModuleList(MLP(8) for _ in range(2))

        def forward(self, z):
            chosen, output = self.router(z).argmax(-1), torch.zeros_like(z)
            for number, expert in enumerate(self.experts):
                output[chosen == number] = expert(z[chosen == number])
            return output

    model = Stack().double()
    for layer in model.layers:
        layer.mlp = Experts().double()
    with pytest.raises(ValueError, match="reads a part of the tokens: experts in a list of modules are not covered"):
        probe(model, prompt().repeat(1, 3, 1) + torch.randn(1, 18, 8).double())


def test_two_small_models_of_another_shape_are_told_apart_by_what_they_compute():
    """The names say nothing: a parallel block whose parts have the names of a sequential one."""
    model, inputs = stack(), prompt()
    for layer in model.layers:
        layer.forward = (lambda b: lambda x: x + b.attention(b.norm_1(x)) + b.mlp(b.norm_2(x)))(layer)
    found = probe(model, inputs)
    assert found == Anatomy("layers", "attention", (), "mlp.down", parallel=True)
    assert verify(model, inputs, 5, positions="query").holds
    assert not re.search("norm_2", repr(found))
