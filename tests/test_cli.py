"""The command line, on a model in a folder: exit codes, files, and errors without a traceback."""

import json
import shutil

import pytest
import torch
from language import shared
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import icl_lib
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
    assert "the model reads 5 tokens of prompt, 'w3 w1 w4 w15 w9'" in by_text.stderr
    assert "and 2 of query, 'w2 w6'" in by_text.stderr
    assert "the model reads" not in by_ids.stderr


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


def test_tokens_that_stay(folder, tmp_path):
    import peft

    report = json.loads(run("verify", "--model", folder, *IDS, "--keep", "2", "--json").stdout)
    assert (report["holds"], report["keep"]) == (True, 2)
    found = run("absorb", "--model", folder, *IDS, "--keep", "2", "--output", tmp_path / "adapter")
    assert "with the first 2 tokens of the prompt, then the query at the positions 5 to 6" in found.stdout
    model = small_language_model("Llama", torch.float32)
    wanted = model(torch.tensor([[3, 1, 4, 15, 9, 2, 6]])).logits[:, 5:]
    call = icl_lib.absorb(model, torch.tensor([[3, 1, 4, 15, 9, 2, 6]]), 5, keep=2).bare(
        torch.tensor([[3, 1, 4, 15, 9, 2, 6]])
    )
    bare = model(**call).logits[:, 2:]
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    torch.testing.assert_close(adapted(**call).logits[:, 2:], wanted, rtol=1e-4, atol=1e-4)
    assert (bare - wanted).norm() > 1e-2 * wanted.norm()
    wrong = run("verify", "--model", folder, *IDS, "--keep", "5")
    assert (wrong.exit_code, "keep is 5" in wrong.stderr) == (2, True)


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
    again = ["report", "--model", folder, *IDS, "--output", path, "--tolerance", "1e-30"]
    refused = run(*again)
    assert (refused.exit_code, f"--output is {path}, which exists" in refused.stderr) == (2, True)
    assert "--overwrite" in refused.stderr
    assert path.read_text() == text
    assert run(*again, "--overwrite").exit_code == 1
    assert path.read_text() != text


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    """Loading fails: what is refused is refused before it."""

    def fail(*_):
        raise AssertionError("the model was loaded before the output was checked")

    monkeypatch.setattr("icl_lib.cli.load", fail)


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("told", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["absorb", "report"])
def test_nothing_is_written_beside_a_model(folder, command, told):
    before = contents(folder)
    output = folder if command == "absorb" else folder / "report.json"
    found = run(command, "--model", folder, *IDS, "--output", output, *told)
    assert (found.exit_code, "holds a model (config.json)" in found.stderr) == (2, True)
    assert contents(folder) == before


@pytest.mark.usefixtures("no_model_is_loaded")
def test_an_output_that_is_in_the_way_is_refused_before_the_model_is_loaded(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output, says in (
        (tmp_path, "which holds notes.txt: give a new or an empty folder, or --overwrite"),
        (tmp_path / "notes.txt", "notes.txt', which is a file: give a folder"),
        (tmp_path / "notes.txt" / "deeper", "notes.txt is a file: give a folder"),
    ):
        found = run("absorb", "--model", folder, *IDS, "--output", output)
        assert (found.exit_code, says in found.stderr) == (2, True), found.output
    found = run("report", "--model", folder, *IDS, "--output", tmp_path / "notes.txt" / "report.json")
    assert (found.exit_code, "the folder of --output is" in found.stderr) == (2, True)
    (tmp_path / "report.json").mkdir()
    found = run("report", "--model", folder, *IDS, "--output", tmp_path / "report.json", "--overwrite")
    assert (found.exit_code, "which is a folder: give the name of a file" in found.stderr) == (2, True)
    free = run("absorb", "--model", folder, *IDS, "--output", tmp_path / "new")  # control: a new folder is taken
    assert "the model was loaded" in str(free.exception)


def test_an_adapter_is_replaced_only_if_told(folder, tmp_path):
    command = ["absorb", "--model", folder, "--output", tmp_path, "--prompt-ids", "3 1 4"]
    assert run(*command, "--query-ids", "5").exit_code == 0
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    refused = run(*command, "--query-ids", "6")
    assert (refused.exit_code, "holds adapter_config.json" in refused.stderr) == (2, True)
    assert contents(tmp_path) == before
    assert run(*command, "--query-ids", "6", "--overwrite").exit_code == 0
    after = contents(tmp_path)
    assert after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert after["notes.txt"] == b"mine"


DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.pop(DOWN), f"its files lack {DOWN}, which transformers fills with random numbers"),
        (lambda tensors: tensors.update({DOWN: torch.ones(3, 4)}), f"its files hold in another shape {DOWN}"),
        (lambda tensors: tensors.update(extra=torch.ones(3)), "its files hold extra, for which the model has no place"),
        (lambda tensors: tensors.update({"e1": torch.ones(3), "e2": torch.ones(3)}), "its files hold e1 and 1 more"),
        (lambda tensors: None, None),  # control
    ],
)
def test_weights_that_do_not_fit_the_model_are_an_error(folder, tmp_path, change, says):
    shutil.copytree(folder, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights, metadata={"format": "pt"})
    found = run("verify", "--model", tmp_path / "copy", *IDS)
    assert found.exit_code == (2 if says else 0)
    assert says is None or (says in found.stderr and "save_pretrained" in found.stderr)
    assert "holds to" not in found.stdout if says else "holds to" in found.stdout


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
def test_wrong_usage_is_named(folder, arguments, says):
    found = run("verify", *([] if "--model" in arguments else ["--model", folder]), *arguments)
    assert found.exit_code == 2
    assert f"error: {says}" in found.stderr
    assert isinstance(found.exception, SystemExit)


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
    assert (found.exit_code, "a pickle can run code" in found.stderr) == (2, True)  # nothing is unpickled


def test_errors_are_printed_whole(tmp_path, monkeypatch):
    """An error of several lines keeps its last line, which may be the remedy."""
    (tmp_path / "config.json").write_text('{"model_type": "of-tomorrow"}')
    found = run("verify", "--model", tmp_path, *IDS)
    assert (found.exit_code, "model type `of-tomorrow`" in found.stderr) == (2, True)
    assert "pip install" in found.stderr.strip().splitlines()[-1]
    (tmp_path / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}')
    (tmp_path / "own.py").write_text("raise SystemExit('code of the model was run')")
    found = run("verify", "--model", tmp_path, *IDS)
    assert (found.exit_code, "runs no code of a model" in found.stderr) == (2, True)

    def refuse(*_, **__):
        raise ValueError("no anatomy:\n\n    register_anatomy(...)\n\ngives one.")

    monkeypatch.setattr("icl_lib.cli.load", refuse)
    assert run("verify", "--model", tmp_path, *IDS).stderr == (
        "error: no anatomy:\n\n    register_anatomy(...)\n\ngives one.\n"
    )


def test_report_of_another_kind_is_refused(folder, tmp_path):
    found = run("report", "--model", folder, *IDS, "--output", tmp_path / "report.pdf")
    assert (found.exit_code, "ends in .json or .html" in found.stderr) == (2, True)


def test_the_version_is_printed():
    found = run("--version")
    assert (found.exit_code, found.stdout) == (0, f"icl_lib {icl_lib.__version__}\n")


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
    assert "Missing [UNK] token" in found.stderr  # the tokenizer's own words
