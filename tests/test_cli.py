"""The command line, on a model in a folder: exit codes, files, and errors of one line."""

import json

import pytest
import torch
from language import shared
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from icl_lib.cli import app
from icl_lib.paper.experiments.language import small_language_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama with a tokenizer of one word a token."""
    path = tmp_path_factory.mktemp("llama")
    shared("Llama", torch.float32).save_pretrained(path)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


TEXT = ["--prompt", "w3 w1 w4 w15 w9 ", "--query", "w2 w6"]
IDS = ["--prompt-ids", "3 1 4 15 9", "--query-ids", "2, 6"]


def test_verify_holds(folder):
    by_text, by_ids = (run("verify", "--model", folder, *given) for given in (TEXT, IDS))
    assert by_text.exit_code == 0, by_text.output
    assert "LlamaForCausalLM, 6 blocks, 2 positions" in by_text.stdout
    assert "The identity holds to 1e-05" in by_text.stdout
    assert by_text.stdout == by_ids.stdout


def test_verify_in_json_and_double_precision(folder):
    found = run("verify", "--model", folder, *TEXT, "--json", "--dtype", "float64", "--joint", "--outer", "down")
    report = json.loads(found.stdout)
    assert (found.exit_code, report["dtype"], report["holds"]) == (0, "float64", True)
    assert report["output_control"] > 1e-2
    assert (report["context_length"], len(report["error"][0])) == (5, 2)


def test_verify_on_whatever_devices_there_are(folder):
    assert run("verify", "--model", folder, *IDS, "--device", "auto").exit_code == 0


def test_verify_fails(folder):
    found = run("verify", "--model", folder, *TEXT, "--tolerance", "1e-30")
    assert found.exit_code == 1
    assert "FAILS" in found.stdout


def test_absorb_writes_an_adapter(folder, tmp_path):
    import peft

    found = run("absorb", "--model", folder, *TEXT, "--output", tmp_path / "adapter")
    assert found.exit_code == 0, found.output
    assert "written to" in found.stdout
    model = small_language_model("Llama", torch.float32)
    ids = torch.tensor([[3, 1, 4, 15, 9, 2, 6]])
    wanted = model(ids).logits[:, 5:]
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    answer = adapted(input_ids=ids[:, 5:], position_ids=torch.tensor([[5, 6]])).logits
    torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)
    assert "at the positions 5 to 6" in found.stdout
    with adapted.disable_adapter():  # negative control
        bare = adapted(input_ids=ids[:, 5:], position_ids=torch.tensor([[5, 6]])).logits
    assert (bare - wanted).norm() > 1e-2 * wanted.norm()


def test_absorb_in_json_and_where_it_fails(folder, tmp_path):
    found = run("absorb", "--model", folder, *IDS, "--output", tmp_path / "adapter", "--json")
    assert json.loads(found.stdout)["holds"] is True
    failed = run("absorb", "--model", folder, *IDS, "--output", tmp_path / "none", "--tolerance", "1e-30")
    assert (failed.exit_code, "nothing was written" in failed.stdout) == (1, True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("suffix", ["json", "html"])
def test_report_writes_a_file(folder, tmp_path, suffix):
    path = tmp_path / "new" / f"report.{suffix}"
    found = run("report", "--model", folder, *IDS, "--output", path)
    assert found.exit_code == 0, found.output
    text = path.read_text()
    if suffix == "json":
        assert json.loads(text)["holds"] is True
    else:
        assert text.startswith("<!doctype html>")
        assert "The identity holds" in text
    assert run("report", "--model", folder, *IDS, "--output", path, "--tolerance", "1e-30").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--prompt-ids", "3 1", "--query-ids", "97"], "inputs[0, 2] is 97: this model has the tokens 0 … 96"),
        (["--prompt-ids", "3 one", "--query-ids", "5"], "--prompt-ids is '3 one': give whole numbers"),
        (["--prompt-ids", "", "--query-ids", "5"], "--prompt-ids holds no token"),
        (["--prompt", "w1"], "give either --query or --query-ids"),
        ([*TEXT, "--query-ids", "5"], "give either --query or --query-ids"),
        ([*TEXT, "--dtype", "int8"], "--dtype is int8: choose one of float64"),
        ([*TEXT, "--device", "nowhere"], "--device is nowhere"),
        ([*TEXT, "--outer", "scale"], "outer is 'scale'"),
        ([*TEXT, "--tolerance", "-1"], "tolerance is -1.0"),
        ([*IDS, "--model", "./nothing"], "--model is ./nothing: there is no such folder"),
        ([*IDS, "--model", "models/of/mine"], "--model is models/of/mine: there is no such folder"),
    ],
)
def test_wrong_usage_is_one_line(folder, arguments, says):
    found = run("verify", *([] if "--model" in arguments else ["--model", folder]), *arguments)
    assert found.exit_code == 2
    assert f"error: {says}" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert "Traceback" not in found.output


def test_a_folder_without_a_tokenizer_or_with_other_weights(folder, tmp_path):
    shared("Llama", torch.float32).save_pretrained(tmp_path)
    found = run("verify", "--model", tmp_path, *TEXT)
    assert (found.exit_code, "no tokenizer that can be loaded" in found.stderr) == (2, True)
    assert "give --prompt-ids" in found.stderr
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    found = run("verify", "--model", tmp_path, *IDS)
    assert (found.exit_code, "its weights cannot be read" in found.stderr) == (2, True)
    weights.unlink()
    torch.save(shared("Llama", torch.float32).state_dict(), tmp_path / "pytorch_model.bin")
    found = run("verify", "--model", tmp_path, *IDS)
    assert (found.exit_code, "safetensors" in found.stderr) == (2, True)  # nothing is unpickled


def test_report_of_another_kind_is_refused(folder, tmp_path):
    found = run("report", "--model", folder, *IDS, "--output", tmp_path / "report.pdf")
    assert (found.exit_code, "ends in .json or .html" in found.stderr) == (2, True)


def test_no_arguments_show_help_and_missing_ones_are_wrong_usage(folder):
    assert "absorb" in run().output
    assert run("verify").exit_code == 2


def test_a_text_that_the_tokenizer_refuses(tmp_path):
    from icl_lib.paper.hidden_rule import export

    export(tmp_path)
    puzzle = ["--prompt", "2+3=10, 4+2=12, ", "--query", "2+8="]
    found = run("verify", "--model", tmp_path, *puzzle, "--json")
    assert (found.exit_code, json.loads(found.stdout)["holds"]) == (0, True)
    found = run("verify", "--model", tmp_path, "--prompt", "2*3=10, ", "--query", "2+8=")
    assert (found.exit_code, "are '2*3=10, 2+8=', which the tokenizer cannot encode" in found.stderr) == (2, True)
    assert len(found.stderr.splitlines()) == 1
