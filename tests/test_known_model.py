"""SmolLM2's results: measured where the model is, stored where it is not."""

import json
import runpy
from pathlib import Path

import jupytext
import pytest

from icl_lib.paper import known_model
from icl_lib.paper.known_model import KnownModel

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["known-model", "compiling"]


@pytest.fixture
def no_model(monkeypatch):
    def missing(*_):
        raise FileNotFoundError("not here")

    monkeypatch.setattr(known_model, "smollm2", missing)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_shows_the_stored_results_of_its_own_code_without_the_model(page, no_model, tmp_path, monkeypatch):
    notebook = jupytext.read(ROOT / "book" / f"{page}.md")
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code"))
    monkeypatch.chdir(ROOT / "book")
    assert "stored results" in runpy.run_path(str(script))["known"]._repr_markdown_()


def test_a_stored_result_of_other_code_is_refused(no_model, tmp_path):
    def blocks(model, tokenizer):
        return 30

    path = tmp_path / "results.json"
    path.write_text(json.dumps({"results": {"blocks": {"code": known_model._code(blocks), "value": 30}}}))
    assert KnownModel(path).measured(blocks) == 30

    def blocks(model, tokenizer):
        return 31

    with pytest.raises(ValueError, match=r"results.json has only a result of other code for blocks: .*make stored"):
        KnownModel(path).measured(blocks)

    def heads(model, tokenizer):
        return 9

    with pytest.raises(ValueError, match="has no result of heads"):
        KnownModel(path).stored(heads)


def test_only_what_is_written_as_code_counts():
    def first():
        def blocks(model, tokenizer):
            return model["#"], f"{len(model)}"

        return blocks

    def second():
        @(lambda function: function)
        def blocks(model, tokenizer):
            return model["#"], f"{len(model)}"  # a comment

        return blocks

    def third():
        def blocks(model, tokenizer):
            return model["!"], f"{len(model)}"

        return blocks

    one, same, other = (known_model._code(make()) for make in (first, second, third))
    assert one == same != other
    assert one == "60df3c09f3e43457", "the same in every version of Python"


def test_results_are_stored_with_their_code_and_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(known_model, "smollm2", lambda: (3, "tokenizer"))
    monkeypatch.setenv("ICL_LIB_STORE_RESULTS", "1")
    known = KnownModel(tmp_path / "results.json")

    @known.stored
    def doubled(model, tokenizer):
        return {"twice": 2 * model}

    assert doubled == {"twice": 6}
    monkeypatch.delenv("ICL_LIB_STORE_RESULTS")
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["results"]["doubled"]["value"] == {"twice": 6}
    assert "torch" in kept["versions"]
    monkeypatch.setenv("ICL_LIB_ONLY_STORED", "1")
    again = KnownModel(tmp_path / "results.json")
    assert again.loaded is None

    @again.measured
    def doubled(model, tokenizer):
        return {"twice": 2 * model}

    assert doubled == {"twice": 6}
