"""``python -m icl_lib compile``: files in, an adapter and its measurements out, errors that name the line."""

import json

import peft
import pytest
import torch
from language import shared
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from icl_lib import compile_prompt
from icl_lib.cli import app
from icl_lib.models.held_out import held_out
from icl_lib.paper.hidden_rule import VOCABULARY, export, load_hidden_rule

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PROMPT = "2+3=10, 4+2=12, 1+5=12, "
SHOWN = [(a, b) for a in range(1, 10) for b in range(1, 10) if (a + 2 * b) % 3]
NEW = [(a, b) for a in range(1, 10) for b in range(1, 10) if (a + 2 * b) % 3 == 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("rule")
    export(path / "model")
    (path / "prompt.txt").write_text(PROMPT)
    (path / "shown.txt").write_text("".join(f"{a}+{b}=\n" for a, b in SHOWN))
    (path / "new.txt").write_text("".join(f"{a}+{b}=\t{2 * (a + b)}\n" for a, b in NEW))
    return path


def run(folder, *arguments, prompt="prompt.txt", queries="shown.txt"):
    given = ["--model", folder / "model", "--prompt-file", folder / prompt, "--queries", folder / queries]
    return CliRunner().invoke(app, ["compile", *map(str, given), *map(str, arguments)])


def ids(texts):
    return [VOCABULARY.encode(text) for text in texts]


def test_an_adapter_is_written_and_measured(folder, tmp_path):
    measured = ["--evaluate", folder / "new.txt", "--report", tmp_path / "report.json"]
    found = run(folder, "--output", tmp_path / "adapter", "--keep", 0, *measured)
    assert found.exit_code == 0, found.output
    assert "is fitted to 54 queries" in found.stdout
    report = json.loads((tmp_path / "report.json").read_text())["held_out"]
    assert (report["queries"], report["accuracy"]["prompted"]) == (27, 1.0)
    assert report["accuracy"]["edited"] > 0.8 > 0.1 > report["accuracy"]["bare"]
    assert report["kl"]["edited"] < 1 < report["kl"]["bare"]
    # The adapter, loaded by PEFT and asked without positions, says what the library's own patch does.
    model, queries = load_hidden_rule(), ids(f"{a}+{b}=" for a, b in NEW)
    patch = compile_prompt(model, VOCABULARY.encode(PROMPT), ids(f"{a}+{b}=" for a, b in SHOWN), keep=0, start=0)
    adapted = peft.PeftModel.from_pretrained(load_hidden_rule(), tmp_path / "adapter")
    with torch.no_grad(), patch.applied(model):
        for query in queries[:5]:
            wanted = model(**patch.bare(query)).logits
            torch.testing.assert_close(adapted(input_ids=query[None]).logits, wanted, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "replaces 18 tokens of a prompt" in card
    assert "fitted to 54 queries" in card


def test_a_report_in_html_and_a_readme_of_ones_own_stay_apart(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("mine")
    page, guard = tmp_path / "report.html", tmp_path / "guard.txt"
    guard.write_text("9+9+9, 1, 2, 3\n10=10\n")
    options = ["--overwrite", "--keep", 0, "--evaluate", folder / "new.txt", "--report", page, "--guard", guard]
    written = run(folder, "--output", tmp_path / "adapter", *options)
    assert written.exit_code == 0, written.output
    assert (tmp_path / "adapter" / "README.md").read_text() == "mine"
    assert "27 held-out queries" in page.read_text()


def test_the_prompted_model_is_its_own_best_stand_in(folder):
    """Control of the measurement: an exact edit agrees on its own queries, and one of another rule does not."""
    model, prompt = load_hidden_rule(dtype=torch.float64), VOCABULARY.encode(PROMPT)
    queries = ids(["2+8=", "3+4=", "5+6="])
    exact = compile_prompt(model, prompt, queries, keep=0, ridge=0)
    found = held_out(exact, model, prompt, queries, [torch.tensor([20]), torch.tensor([14]), torch.tensor([22])])
    assert found.kl["edited"] < 1e-12 < 0.1 < found.kl["bare"]
    assert (found.agreement["edited"], found.accuracy["edited"]) == (1.0, found.accuracy["prompted"])
    other = compile_prompt(model, VOCABULARY.encode("2+3=6, 4+2=7, 1+5=7, "), queries, keep=0, ridge=0)
    assert held_out(other, model, prompt, queries).agreement["edited"] < 0.5
    assert "right" not in str(held_out(other, model, prompt, queries))
    with pytest.raises(ValueError, match="so give token ids"):
        held_out(exact, model, torch.randn(3, 4), queries)
    with pytest.raises(ValueError, match="queries are empty"):
        held_out(exact, model, prompt, [])
    with pytest.raises(ValueError, match="answers are 1 and queries 3"):
        held_out(exact, model, prompt, queries, queries[:1])


@pytest.mark.parametrize(
    ("files", "arguments", "says"),
    [
        ({"queries": "2+3=\n4+4=\t8\n"}, [], "whose line 2 differs from the first in having a tab"),
        ({"queries": "\n"}, [], "which is empty: give a file with a text"),
        ({"prompt": " "}, [], "--prompt-file is"),
        ({}, ["--system-file", "x"], "give either --prompt-file or --system-file"),
        ({}, ["--keep", "30"], "keep is 30"),
        ({}, ["--ridge", "-1"], "ridge is -1"),
        ({}, ["--report", "report.txt"], "give a name that ends in .json or .html"),
        ({"queries": "2*3=\n"}, [], "which the tokenizer cannot encode: give a text in its vocabulary"),
    ],
)
def test_wrong_usage_is_named_and_nothing_is_written(folder, tmp_path, files, arguments, says):
    names = {"prompt": folder / "prompt.txt", "queries": folder / "shown.txt"}
    for name, text in files.items():
        names[name] = tmp_path / f"{name}.txt"
        names[name].write_text(text)
    found = run(folder, "--output", tmp_path / "adapter", *arguments, **names)
    assert found.exit_code == 2, found.output
    assert says in found.stderr
    assert not (tmp_path / "adapter").exists()


CHAT = (
    "{% for m in messages %}w92 {{ 'w90 ' if m.role == 'system' else 'w94 ' }}{{ m.content }} w91 {% endfor %}"
    "{{ 'w93' if add_generation_prompt else '' }}"
)
MOVED = "{{ 'w80 ' if add_generation_prompt else '' }}" + CHAT  # a conversation begins otherwise than its system prompt


@pytest.mark.parametrize(("template", "says"), [(CHAT, None), (MOVED, "does not begin as"), (None, "chat template")])
def test_a_system_prompt_goes_through_the_chat_template(tmp_path, template, says):
    model = shared("Llama", torch.float32)
    model.save_pretrained(tmp_path / "model")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "system.txt").write_text("w3 w1 w4\n")
    (tmp_path / "queries.txt").write_text("w5 w6\nw7\n")
    given = ["--model", tmp_path / "model", "--system-file", tmp_path / "system.txt", "--output", tmp_path / "adapter"]
    given += ["--queries", tmp_path / "queries.txt"]
    found = CliRunner().invoke(app, ["compile", *map(str, given)])
    if says:
        assert (found.exit_code, says in found.stderr, (tmp_path / "adapter").exists()) == (2, True, False)
        return
    assert found.exit_code == 0, found.output
    # Independently of the command: the tokens that the template gives.
    prompt = torch.tensor([92, 90, 3, 1, 4, 91])
    queries = [torch.tensor([92, 94, 5, 6, 91, 93]), torch.tensor([92, 94, 7, 91, 93])]
    patch = compile_prompt(model, prompt, queries, keep=2, start=2)
    again = type(model).from_pretrained(tmp_path / "model")  # PEFT changes the model that it is given
    adapted = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")
    ids = torch.cat([prompt[:2], queries[1]])[None]
    with torch.no_grad():
        got, bare = adapted(input_ids=ids).logits, model(input_ids=ids).logits
        with patch.applied(model):
            wanted = model(**patch.bare(queries[1])).logits
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert (bare - wanted).abs().max() > 1e-2
    assert "Put 'w92 w90' in front" in found.stdout
    found = CliRunner().invoke(app, ["compile", *map(str, given), "--overwrite", "--keep", "1"])
    assert (found.exit_code, "queries[0] begins with the kept token" in found.stderr) == (2, True)
    assert "keep=2" in found.stderr
