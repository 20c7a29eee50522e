"""The language model in the browser, compared with the library on the same weights."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from browser import visiting
from cases import relative
from playwright.sync_api import Browser, Page
from torch import Tensor, nn

from icl_lib import absorb
from icl_lib.paper.hidden_rule import VOCABULARY, load_hidden_rule, sample_prompts
from icl_lib.paper.hidden_rule.checkpoint import DATA
from icl_lib.theorem import least_norm_edit
from icl_lib.widgets.page import STATIC

MODULE = (STATIC / "language_model.mjs").read_text(encoding="utf-8")
WEIGHTS = (DATA / "hidden_rule.safetensors").read_bytes()
CONFIG = json.loads((DATA / "hidden_rule.json").read_text(encoding="utf-8"))["config"]
LOAD = """async ([module, config, weights]) => {
  const engine = await import(URL.createObjectURL(new Blob([module], { type: "text/javascript" })));
  const bytes = Uint8Array.from(atob(weights), (c) => c.charCodeAt(0)).buffer;
  const model = new engine.LanguageModel(config, engine.readWeights(bytes));
  // All numbers in the arrays of a value, one after the other, as base64.
  const flat = (value) => ArrayBuffer.isView(value) ? [value] : Object.values(value).flatMap(flat);
  const packed = (...values) => {
    const arrays = flat(values);
    const numbers = new Float64Array(arrays.reduce((sum, array) => sum + array.length, 0));
    arrays.reduce((at, array) => (numbers.set(array, at), at + array.length), 0);
    let text = "";
    for (const byte of new Uint8Array(numbers.buffer)) text += String.fromCharCode(byte);
    return btoa(text);
  };
  Object.assign(window, { engine, model, packed });
}"""
SIZES = {"gate": (192, 64), "up": (192, 64), "down": (64, 192)}
PATHS = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    """An empty page with the module as ``engine``, the book's model as ``model``, and ``packed``."""
    with visiting(browser, "about:blank") as visit:
        visit.page.evaluate(LOAD, [MODULE, CONFIG, base64.b64encode(WEIGHTS).decode()])
        yield visit.page
        assert visit.problems() == []


class Rotary(nn.Module):
    """The angles of the positions, not rounded to float32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = CONFIG["rope_parameters"]["rope_theta"] ** (-torch.arange(0, 16, 2).double() / 16)
        angles = position_ids[..., None] * torch.cat([frequencies, frequencies])
        return angles.cos(), angles.sin()


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    """The book's model in float64 throughout: as `transformers` loads it, norms and angles are always float32."""
    model = load_hidden_rule(dtype=torch.float64)
    model.model.rotary_emb = Rotary()
    for layer in [*model.model.layers, model.model]:
        for name in ("input_layernorm", "post_attention_layernorm", "norm"):
            if hasattr(layer, name):
                norm = nn.RMSNorm(64, CONFIG["rms_norm_eps"]).double()
                norm.weight.data = getattr(layer, name).weight.data
                setattr(layer, name, norm)
    return model.requires_grad_(False)


class Numbers:
    """The numbers that the browser packed, taken in order."""

    def __init__(self, text: str) -> None:
        self.left = torch.from_numpy(np.frombuffer(base64.b64decode(text)).copy())

    def take(self, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        taken, self.left = self.left[:count], self.left[count:]
        return taken.reshape(shape)

    def edits(self, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
        """The factors of the edits of one block, ``[out, rank]`` and ``[in, rank]``."""
        return {name: (self.take(rank, out).T, self.take(rank, into).T) for name, (out, into) in SIZES.items()}


def seen(model: nn.Module, ids: Tensor, positions: Tensor) -> list[dict[str, Tensor]]:
    """What the parts of each block read at all tokens."""
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    hooks = []
    for here, layer in zip(found, model.model.layers, strict=True):
        for name, part in (
            ("stream", layer.post_attention_layernorm),
            ("read", layer.mlp.gate_proj),
            ("hidden", layer.mlp.down_proj),
        ):
            hooks.append(
                part.register_forward_pre_hook(lambda _, args, here=here, name=name: here.update({name: args[0]}))
            )
    model(ids, position_ids=positions)
    for hook in hooks:
        hook.remove()
    return found


def close(found: Tensor, wanted: Tensor) -> bool:
    return relative(found, wanted) < 1e-10


@pytest.mark.parametrize("examples", [1, 2, 3, 4, 6])
def test_the_browser_computes_what_the_library_computes(page, reference, examples):
    """The forward pass, the edits of each query token, those that serve all, and the runs with both, of 40 prompts."""
    ids = sample_prompts(40, examples, seed=examples).tokens
    count, first, positions = ids.shape[1], ids.shape[1] - 4, torch.arange(ids.shape[1])[None]
    texts = page.evaluate(
        """([prompts, first]) => prompts.map((ids) => {
          const [examples, question] = [ids.slice(0, first), ids.slice(first)];
          const { logits, blocks } = model.run(ids);
          const parts = blocks.map((b) => [b.attention, b.stream, b.read, b.hidden]);
          const edits = [{ own: true }, { all: true }].map((options) => model.editsFor(examples, [question], options));
          const runs = [...edits, null].map((edits) => model.run(question, { first, edits }).logits);
          return packed(logits, parts, edits, runs);
        })""",
        [ids.tolist(), first],
    )
    prompted = reference(ids, position_ids=positions).logits
    bare = reference(ids[:, first:], position_ids=positions[:, first:]).logits
    loaded = load_hidden_rule(dtype=torch.float64)
    loaded.set_attn_implementation("eager")  # the only one that returns its attention
    as_loaded = loaded(ids, output_attentions=True)
    blocks = seen(reference, ids, positions)
    patch = absorb(reference, ids, context_length=first)
    for n, got in enumerate(map(Numbers, texts)):
        logits = got.take(count, 103)
        assert close(logits, prompted[n])
        assert relative(logits, as_loaded.logits[n]) < 1e-5  # float32 in its norms, angles and softmax
        for block, attention in zip(blocks, as_loaded.attentions, strict=True):
            assert relative(got.take(4, count, count), attention[n]) < 1e-5
            for name, width in (("stream", 64), ("read", 64), ("hidden", 192)):
                assert close(got.take(count, width), block[name][n]), name
        for block in patch.blocks:
            for name, (left, right) in got.edits(4).items():
                edit = block.edits[PATHS[name]].dense()[n]
                assert close((left.T[..., None] * right.T[:, None]).flatten(1), edit.flatten(1)), name
        joint = [got.edits(4) for _ in patch.blocks]
        if n % 4 == 0:  # the library takes the longest for these; what they must do is checked for every prompt below
            edits = absorb(reference, ids[n : n + 1], context_length=first, joint=True).blocks
            for block, found in zip(edits, joint, strict=True):
                for name, (left, right) in found.items():
                    assert close(left @ right.T, block.edits[PATHS[name]].dense()), name
        for _ in ("own", "joint"):
            assert close(got.take(4, 103), prompted[n, first:])
        assert close(got.take(4, 103), bare[n])
        assert not len(got.left)
    assert relative(bare[:, -1], prompted[:, -1]) > 0.1, "the control: the examples change nothing"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_edit_serves_the_last_tokens_of_several_questions(page, reference, count):
    """By hand: block by block, the smallest edits for the last token of each question, added to a copy's weights."""
    for prompts in (sample_prompts(count + 1, 3, seed) for seed in range(5)):
        ids = prompts.by(prompts.rule[:1].expand(count + 1)).tokens
        examples, questions = ids[0, :-4], ids[:, -4:]
        ids = torch.cat([examples.expand(count + 1, -1), questions], dim=1)
        positions = torch.arange(ids.shape[1])[None]
        wanted = seen(reference, ids[:count], positions)
        edited = copy.deepcopy(reference)
        got = Numbers(
            page.evaluate(
                """([examples, questions]) => {
                  const edits = model.editsFor(examples, questions.slice(0, -1));
                  const run = (question) => model.run(question, { first: examples.length, edits });
                  return packed(edits, questions.map((question) => model.next(run(question))));
                }""",
                [examples.tolist(), questions.tolist()],
            )
        )
        for block, layer in enumerate(edited.model.layers):
            here = seen(edited, questions[:count], positions[:, -4:])[block]
            old, new = ({name: reads[name][:, -1] for name in ("stream", "read")} for reads in (wanted[block], here))
            mlp, edits = layer.mlp, got.edits(count)
            for name, inner in (("gate", mlp.gate_proj), ("up", mlp.up_proj)):
                edit = least_norm_edit(new["read"], (old["read"] - new["read"]) @ inner.weight.mT)
                assert close(edits[name][0] @ edits[name][1].T, edit.dense())
                inner.weight += edit.dense()
            hidden = mlp.act_fn(mlp.gate_proj(new["read"])) * mlp.up_proj(new["read"])
            edit = least_norm_edit(hidden, old["stream"] - new["stream"])
            assert close(edits["down"][0] @ edits["down"][1].T, edit.dense())
            mlp.down_proj.weight += edit.dense()
        chances = got.take(count + 1, 103)
        alone = edited(questions, position_ids=positions[:, -4:]).logits[:, -1].softmax(-1)
        prompted = reference(ids, position_ids=positions).logits[:, -1].softmax(-1)
        assert close(chances, alone)
        assert close(chances[:count], prompted[:count])
        assert relative(chances[count], prompted[count]) > 1e-4, "the control: the edit serves any question"


def test_tokens_are_those_of_the_vocabulary(page):
    for ids in sample_prompts(50, 3, seed=0).tokens:
        text = VOCABULARY.decode(ids)
        assert page.evaluate("(text) => engine.encode(text)", text) == ids.tolist()
        assert page.evaluate("(text) => engine.encode(text).map(engine.decode).join('')", text) == text.replace(" ", "")
    refused = "(text) => { try { return engine.encode(text); } catch (error) { return error.message; } }"
    for text, message in (("2*3=", "“*” is no token"), ("2+100=", "100 is no token"), ("2+03=", "03 is no token")):
        assert message in page.evaluate(refused, text)
        with pytest.raises(ValueError, match="text"):
            VOCABULARY.encode(text)


def test_an_edit_that_cannot_be_is_refused(page):
    """The same question twice is read alike, so no edit can be made from both."""
    refused = """(questions) => {
      try { return model.editsFor(engine.encode("2+3=10,"), questions.map(engine.encode)); }
      catch (error) { return error.message; }
    }"""
    assert "No single edit serves" in page.evaluate(refused, ["2+8=", "2+8="])


def test_the_time_of_a_prompt_with_all_its_edits(page, capsys):
    """Printed, not judged: 20 tokens, the edits of each query token and of all, and a run with the edits."""
    timed = """([ids, first]) => {
      const times = [];
      for (let n = 0; n < 40; n++) {
        const start = performance.now();
        const edits = model.editsFor(ids.slice(0, first), [ids.slice(first)], { own: true });
        model.run(ids.slice(first), { first, edits });
        times.push(performance.now() - start);
      }
      return [Math.min(...times), times.sort((a, b) => a - b)[20]];
    }"""
    ids = VOCABULARY.encode("2+3=10, 4+2=12, 1+5=12, 2+8=").tolist()[2:]
    devtools = page.context.new_cdp_session(page)
    for slower in (1, 4):
        devtools.send("Emulation.setCPUThrottlingRate", {"rate": slower})
        fastest, median = page.evaluate(timed, [ids, len(ids) - 4])
        with capsys.disabled():
            print(f"\n{len(ids)} tokens with all edits, {slower} × slower: {fastest:.1f} to {median:.1f} ms")
    devtools.send("Emulation.setCPUThrottlingRate", {"rate": 1})
