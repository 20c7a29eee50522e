"""Claims: what a chapter may claim, and the page that lists all claims with their numbers."""

import dataclasses
import json
import re
import subprocess
import sys
from collections import Counter

import claims
import nbformat
import pytest
import torch
from conftest import ROOT

from icl_lib import symbolic
from icl_lib.paper.claims import GLUE, Claim, claim, claim_derivation
from icl_lib.symbolic import single_token_attention

PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "book").glob("*.md"))}
ROWS = re.findall(r"^:::\{claim\} (\S+)$", PAGES["claims"], re.MULTILINE)
MARKS = {page: re.findall(r"\{claim\}`([^`]+)`", text) for page, text in PAGES.items()}
GOOD = {"at_most": 1e-12, "control": 0.84}


# --- a claim in a cell


def test_a_claim_says_what_it_checked(capsys):
    claim("exact", torch.tensor(7.2e-16), at_most=1e-12, control=torch.tensor(0.25).double(), beyond=1e-2)
    claim("accurate", 0.97, at_least=0.95, control=0.05)
    claim("answer", "20", equals="20", control="13")
    claim("proved", True, control=False)
    claim("by-design", 3, equals=3, without_control="it is counted")
    assert capsys.readouterr().out.replace("\N{NO-BREAK SPACE}", " ").splitlines() == [
        "✓ exact: 7.2 × 10⁻¹⁶ ≤ 10⁻¹²; control: 0.25 ≥ 0.01",
        "✓ accurate: 0.97 ≥ 0.95; control: 0.05 < 0.95",
        "✓ answer: 20; control: 13 ≠ 20",
        "✓ proved: holds; control: does not hold",
        "✓ by-design: 3; control: none: it is counted",
    ]


@pytest.mark.parametrize(
    ("value", "more", "complaint"),
    [
        (2e-12, GOOD, "a does not hold: 2 × 10⁻¹² > 10⁻¹²"),
        (float("nan"), GOOD, "value is nan"),
        (1e-15, {**GOOD, "control": float("inf")}, "control is inf"),
        (1e-15, {**GOOD, "control": 3e-13}, "the control is 3 × 10⁻¹³ ≤ 10⁻¹², so the check cannot fail"),
        (1e-15, {**GOOD, "beyond": 0.9}, "the control is 0.84 < 0.9"),
        (0.9, {"at_least": 0.95, "control": 0.1}, "a does not hold: 0.9 < 0.95"),
        ("13", {"equals": "20", "control": "20"}, "a does not hold: 13 ≠ 20"),
        ("20", {"equals": "20", "control": "20"}, "so the check cannot fail"),
        (False, {"control": False}, "a does not hold"),
        (True, {"control": True}, "so the check cannot fail"),
    ],
)
def test_a_claim_that_does_not_hold_stops_the_chapter(value, more, complaint):
    with pytest.raises(AssertionError) as error:
        claim("a", value, **more)
    assert complaint in str(error.value).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("name", "more", "complaint"),
    [
        ("Not a name", GOOD, "name is 'Not a name'"),
        ("a", {"control": 1.0}, "has 0 bounds"),
        ("a", {**GOOD, "at_least": 0.0}, "has 2 bounds"),
        ("a", {"at_most": 1e-12}, "give a control, or else say"),
        ("a", {**GOOD, "without_control": "both"}, "give a control, or else say"),
        ("a", {"at_most": float("inf"), "control": 1.0}, "no number can break"),
        ("a", {**GOOD, "beyond": 1e-13}, "beyond=1e-13, which is not beyond"),
        ("a", {"equals": 0.0, "control": 1.0, "beyond": 1.0}, "which is not beyond"),
        ("a", {"at_most": 1e-12, "without_control": "none", "beyond": 1.0}, "beyond, but no control"),
        ("a", {**GOOD, "control": [1.0]}, "control is a list"),
    ],
)
def test_a_claim_that_cannot_fail_is_refused(name, more, complaint):
    with pytest.raises(ValueError, match=complaint):
        claim(name, 1e-15, **more)


def test_a_derivation_is_claimed_with_a_wrong_result_as_control(capsys):
    claim_derivation(single_token_attention())
    assert capsys.readouterr().out == "✓ single-token-attention: holds; control: does not hold\n"
    wrong = dataclasses.replace(single_token_attention(), result=2 * single_token_attention().result)
    with pytest.raises(AssertionError, match="does not hold"):
        claim_derivation(wrong)


# --- the rows and the chapters


def test_every_claim_of_a_chapter_has_one_row_and_every_row_a_chapter():
    marked = [name for marks in MARKS.values() for name in marks]
    assert [name for name, times in Counter(ROWS).items() if times > 1] == []
    assert [name for name, times in Counter(marked).items() if times > 1] == []
    assert sorted(ROWS) == sorted(marked)
    for page, text in PAGES.items():
        called = re.findall(r"\bclaim\(\s*\"([^\"]+)\"", text)
        assert set(called) <= set(MARKS[page]), f"{page} checks claims that its text does not mark"
        for name in MARKS[page]:  # what a loop checks is found by its name
            assert f'"{name}"' in text or f"symbolic.{name.replace('-', '_')}" in text, f"{page} does not check {name}"


def test_every_derivation_is_claimed():
    assert {name.replace("_", "-") for name in symbolic.__all__ if name[0].islower()} <= set(ROWS)


def test_what_the_page_says_of_a_paper_leads_to_rows():
    linked = set(re.findall(r"\]\(#claim-([^)]+)\)", PAGES["claims"]))
    assert linked
    assert linked <= set(ROWS)


def test_faults_are_found():
    rows, checks, marks = {"claims": {"a": {}, "b": {}}}, {"one": {"a": {}}, "two": {"b": {}}}, {"one": {"a": ""}}
    marks["two"] = {"b": ""}
    assert list(claims.faults(rows, checks, marks)) == []
    for changed, complaint in (
        (({"claims": {"a": {}}}, checks, marks), "'b' is not registered"),
        (({"claims": {**rows["claims"], "c": {}}}, checks, marks), "no chapter checks the claim 'c'"),
        ((rows, {**checks, "three": {"a": {}}}, {**marks, "three": {"a": ""}}), "'a' is checked on several pages"),
        ((rows, checks, {"one": {"a": ""}}), "'b' has no place"),
        ((rows, checks, {**marks, "one": {"a": "", "b": ""}}), "marks the claim 'b', which no cell of this page"),
        (({**rows, "more": {"a": {}}}, checks, marks), "'a' has rows on several pages"),
    ):
        assert any(complaint in fault for _, fault in claims.faults(*changed)), complaint


def chapter(text: str, *found: Claim) -> str:
    """A notebook with a text, after a cell that has checked these claims."""
    outputs = [
        nbformat.v4.new_output(
            "display_data",
            {"application/papermill.record/text/plain": str(one)},
            metadata={
                "scrapbook": {"name": f"{GLUE}{one.name}", "mime_prefix": "application/papermill.record/"},
                "claim": dataclasses.asdict(one),
            },
        )
        for one in found
    ]
    cell = nbformat.v4.new_code_cell("check()", outputs=outputs, metadata={"tags": ["remove-cell"]})
    return nbformat.writes(nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell(text)]))


REGISTER = """# Claims

```{claims-summary}
```

:::{claim} exact
:source: A paper, version 2, Theorem 3
:kind: identity
For every $x$, the error is **rounding**.
:::
"""
EXACT = Claim("exact", 7e-16, "≤", 1e-12, 0.84, 0.01)


class Book:
    """A small book of Sphinx, built as often as wanted."""

    def __init__(self, folder):
        self.source, self.built = folder / "book", folder / "_build" / "html"
        self.source.mkdir()
        extension = ROOT / "book" / "_ext"
        settings = f"import sys\nsys.path[:0] = [{str(extension)!r}, {str(ROOT)!r}]\n"
        settings += 'extensions = ["myst_nb", "claims"]\nnb_execution_mode = "off"\n'
        settings += 'myst_enable_extensions = ["colon_fence", "dollarmath"]\n'
        self.write("conf.py", settings)
        self.write("index.md", "# Book\n\n```{toctree}\none\nclaims\n```\n")
        self.write("claims.md", REGISTER)
        self.write("one.ipynb", chapter("# One\n\n## Part\n\nIt is exact.{claim}`exact`", EXACT))

    def write(self, name, text):
        (self.source / name).write_text(text, encoding="utf-8")

    def build(self):
        command = [sys.executable, "-m", "sphinx", "-W", "-q", "--keep-going", self.source, self.built]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        return run.returncode, run.stderr

    def page(self, name):
        return (self.built / name).read_text(encoding="utf-8").replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.slow
def test_a_small_book_lists_its_claims(tmp_path):
    book = Book(tmp_path)
    assert book.build() == (0, "")
    page, one = book.page("claims.html"), book.page("one.html")
    assert re.search(r'<div class="[^"]*\bclaim\b[^"]*" id="claim-exact">', page)
    assert "✓ 7 × 10⁻¹⁶ ≤ 10⁻¹²" in page
    assert "control: 0.84 ≥ 0.01" in page
    assert 'href="one.html#check-exact">One: Part</a>' in page
    assert "1 claim was checked" in page
    assert 'id="check-exact"' in one
    assert (
        'href="claims.html#claim-exact" title="Checked in this build: 7 × 10⁻¹⁶ ≤ 10⁻¹². Control: 0.84 ≥ 0.01.">' in one
    )
    assert "check()" not in one
    [entry] = json.loads(book.page("claims.json"))
    assert entry["statement"] == "For every $x$, the error is rounding."
    assert entry["value"] == 7e-16
    assert entry["place"] == "one.html#check-exact"

    # Another build reads only the page that has changed, and the row follows. Each fault is named.
    changed = dataclasses.replace(EXACT, value=3e-16)
    book.write("one.ipynb", chapter("# One\n\nNothing.", changed, dataclasses.replace(EXACT, name="other")))
    status, output = book.build()
    assert status != 0
    for complaint in ("'other' is not registered", "'other' has no place", "'exact' has no place"):
        assert complaint in output
    assert "✓ 3 × 10⁻¹⁶ ≤ 10⁻¹²" in book.page("claims.html")
    assert json.loads(book.page("claims.json"))[0]["value"] == 3e-16


# --- the page of the book


def test_the_page_and_the_file_agree(site):
    entries = json.loads((site / "book" / "claims.json").read_text(encoding="utf-8"))
    fields = {field.name for field in dataclasses.fields(Claim)} | {
        *("statement", "source", "derived", "kind", "holds", "row", "place")
    }
    assert [entry["name"] for entry in entries] == ROWS
    for entry in entries:
        assert entry.keys() == fields
        assert entry["statement"]
        assert entry["kind"] in claims.KINDS.values()
        assert entry["relation"] in ("≤", "≥", "=")
        assert (entry["control"] is None) == bool(entry["without_control"])
        for link in (entry["row"], entry["place"]):
            page, anchor = link.split("#")
            assert f'id="{anchor}"' in (site / page).read_text(encoding="utf-8"), link
