"""Widgets: their form in a kernel and on a page, and errors that name the argument."""

from __future__ import annotations

import base64
import html
import json
import re
import secrets
import zlib
from collections.abc import Iterator

import ipywidgets
import numpy as np
import pytest
import sympy
import torch
from IPython.display import HTML

from icl_lib.paper.figures import Figure, figure
from icl_lib.widgets import AttentionHead, Playground, Puzzle, explore, explorer
from icl_lib.widgets.page import STATIC, module, page_html


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> None:
    """As while the book is built."""
    monkeypatch.setenv("ICL_LIB_BOOK_BUILD", "1")


@pytest.fixture(autouse=True)
def no_book(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("ICL_LIB_BOOK_BUILD", raising=False)
    return


def parts(page: str) -> tuple[dict, str]:
    """The state and the fallback of a widget's HTML."""
    match = re.fullmatch(
        r'<div class="icl-widget" data-widget="\w+"><script type="application/json">(.*?)</script>(.*)</div>',
        page,
        re.DOTALL,
    )
    state = json.loads(match[1])
    if isinstance(state.get("frames"), str):
        state["frames"] = json.loads(zlib.decompress(base64.b64decode(state["frames"])))
    return state, match[2]


def shown(view: ipywidgets.VBox) -> str:
    """What the output below the controls shows."""
    (output,) = view.children[-1].outputs
    return output["data"]["text/html"]


def text(**values: object) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


# --- explore with a kernel


def test_controls_of_a_kernel():
    view = explore(
        lambda **values: text(**values),
        k=range(1, 3),
        rate=np.array([0.1, 1.0]),
        layer=["attention", "GRU"],
        size={"small": 1, "large": 9},
        many=list("abcdef"),
        trained=[False, True],
    )
    assert [type(child).__name__ for child in view.children] == [
        "SelectionSlider",
        "SelectionSlider",
        "ToggleButtons",
        "ToggleButtons",
        "Dropdown",
        "Checkbox",
        "Output",
    ]
    assert "k=1, rate=0.1, layer='attention', size=1, many='a', trained=False" in html.unescape(shown(view))


def test_moving_a_control_draws_again():
    calls = []
    view = explore(lambda k, on: calls.append((k, on)) or f"{k} {on}", k=[10, 20, 30], on=[False, True])
    slider, checkbox = view.children[:2]
    slider.value = 2
    checkbox.value = True
    assert calls == [(10, False), (30, False), (30, True)]
    assert "30 True" in shown(view)


def test_nothing_is_drawn_twice_outside_the_build():
    calls = []
    explore(lambda k: calls.append(k) or "x", k=range(100))
    assert calls == [0]


def test_error_of_draw_is_shown_and_the_next_value_recovers():
    view = explore(lambda k: 1 / (k - 1), k=range(3))
    view.children[0].value = 1
    (output,) = view.children[-1].outputs
    assert output["output_type"] == "error"
    assert "draw failed at k = 1" in output["evalue"]
    assert any("ZeroDivisionError" in line for line in output["traceback"])
    view.children[0].value = 2
    assert "1.0" in shown(view)


def test_error_of_the_first_draw_ends_the_cell():
    with pytest.raises(RuntimeError, match="draw failed at learning rate = 0"):
        explore(lambda learning_rate: 1 / learning_rate, learning_rate=range(3))


def test_labels_and_initial_values():
    view = explore(
        lambda **values: text(**values),
        initial={"learning_rate": 0.01, "on": True, "layer": "GRU", "size": 9},
        labels={"on": "switched on"},
        learning_rate=[0.1, 0.01],
        on=[False, True],
        layer=["attention", "GRU"],
        size={"small": 1, "9": 9},
    )
    assert [child.description for child in view.children[:-1]] == ["learning rate", "switched on", "layer", "size"]
    assert "learning_rate=0.01, on=True, layer='GRU', size=9" in html.unescape(shown(view))


def test_a_checkbox_can_start_on():
    assert "on=True" in shown(explore(lambda on: text(on=on), on=[True, False]))


# --- explore while the book is built


@pytest.mark.usefixtures("book")
def test_page_has_a_frame_for_every_combination():
    calls = []
    page = explore(
        lambda k, on: calls.append((k, on)) or f"<{k} {on}>", initial={"k": 3}, k=[1, 2, 3], on=[False, True]
    )
    state, fallback = parts(page._repr_html_())
    assert calls == [(k, on) for k in (1, 2, 3) for on in (False, True)]
    assert state["controls"] == [
        {"name": "k", "label": "k", "kind": "slider", "options": ["1", "2", "3"], "at": 2},
        {"name": "on", "label": "on", "kind": "checkbox", "options": ["False", "True"], "at": 0},
    ]
    assert state["order"] == [0, 1, 2, 3, 4, 5]
    assert state["frames"][4] is None, "the first frame is in the page already"
    assert "&lt;3 False&gt;" in fallback
    assert "&lt;2 True&gt;" in state["frames"][3]


@pytest.mark.usefixtures("book")
def test_page_keeps_equal_frames_once():
    state, _ = parts(explore(lambda k: f"{k // 2}", k=range(6))._repr_html_())
    assert state["order"] == [0, 0, 1, 1, 2, 2]
    assert len(state["frames"]) == 3


@pytest.mark.usefixtures("book")
def test_page_shows_what_draw_returns():
    def draw(kind):
        with figure() as (fig, ax):
            ax.plot([0, 1])
        return {
            "figure": Figure(fig, "a line"),
            "matplotlib": fig,
            "html": HTML("<b>bold</b>"),
            "latex": sympy.Symbol("x") ** 2,
            "number": 0.5,
            "integer": np.int64(3),
            "list": ["one", sympy.Integer(2)],
        }[kind]

    kinds = ["figure", "matplotlib", "html", "latex", "number", "integer", "list"]
    state, fallback = parts(explore(draw, kind=kinds)._repr_html_())
    frames = dict(zip(kinds, (fallback, *state["frames"][1:]), strict=True))
    assert 'aria-label="a line"' in frames["figure"]
    assert 'aria-label="kind = matplotlib"' in frames["matplotlib"]
    assert frames["html"] == "<b>bold</b>"
    assert r"\[\displaystyle x^{2}\]" in frames["latex"]
    assert ">0.5<" in frames["number"]
    assert ">3<" in frames["integer"]
    assert ">one<" in frames["list"]
    assert r"\[\displaystyle 2\]" in frames["list"]


@pytest.mark.usefixtures("book")
def test_page_is_limited_in_bytes(monkeypatch):
    monkeypatch.setattr(explorer, "MAX_PAGE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"3 frames take .* give some controls fewer values"):
        explore(lambda k: secrets.token_hex(1000), k=range(3))


# --- what explore refuses, with a kernel and without


@pytest.mark.parametrize("building", [False, True], ids=["kernel", "book"])
@pytest.mark.parametrize(
    ("draw", "controls", "message"),
    [
        ("picture", {"k": [1]}, "draw is a str: give a function"),
        (text, {}, "explore has no controls"),
        (text, {"k": []}, "k is empty"),
        (text, {"k": {}}, "k is empty"),
        (text, {"k": 3}, "k is 3: give a list"),
        (text, {"k": "abc"}, "k is 'abc': give a list"),
        (text, {"k": {1, 2}}, "k is {1, 2}: give a list"),
        (text, {"k": [0.5, float("nan")]}, r"k\[1\] is nan: give finite numbers"),
        (text, {"k": np.array([np.inf])}, r"k\[0\] is inf"),
        (text, {"k": np.zeros((2, 2))}, r"k has shape \(2, 2\): give an array with one dimension"),
        (text, {"k": torch.tensor(1.0)}, r"k has shape \(\)"),
        (text, {"k": [1, 2, 1]}, "k has 1 twice"),
        (text, {"k": range(20), "j": range(11)}, r"have 220 frames \(k: 20 × j: 11\), more than 200: give"),
        (lambda k: "", {"j": [1]}, "cannot be called with the controls j"),
        (lambda k, j: "", {"k": [1]}, "missing a required argument: 'j'"),
        (lambda k: None, {"k": [7]}, "draw returned NoneType for k = 7: return a Figure"),
        (lambda k: [], {"k": [7]}, "draw returned list for k = 7"),
        (text, {"k": [1], "initial": {"k": 2}}, r"initial\['k'\] is 2: choose one of 1"),
        (text, {"k": [1], "initial": {"j": 2}}, r"initial\['j'\] names no control: the controls are k"),
        (text, {"k": [1], "initial": 2}, "initial is 2: give a dictionary"),
        (text, {"k": [1], "labels": {"j": "x"}}, r"labels\['j'\] names no control"),
    ],
)
def test_explore_refuses(monkeypatch, building, draw, controls, message):
    if building:
        monkeypatch.setenv("ICL_LIB_BOOK_BUILD", "1")
    with pytest.raises(ValueError, match=message):
        explore(draw, **controls)


# --- the playground


def test_playground_takes_what_holds_numbers():
    playground = Playground(W=np.eye(2), a=torch.tensor([1.0, 2.0], requires_grad=True), d=(0, 1))
    assert (playground.W, playground.a, playground.d) == ([[1, 0], [0, 1]], [1, 2], [0, 1])
    playground.d = np.array([3, 4])
    assert playground.d == [3.0, 4.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"W": [1, 2, 3, 4]}, r"W has shape \(4,\)"),
        ({"a": [[1, 2]]}, r"a has shape \(1, 2\)"),
        ({"d": [float("nan"), 0]}, r"d\[0\] is not finite"),
        ({"d": None}, "d is None: give numbers"),
        ({"a": (0, 0)}, "a is zero: the theorem needs a₀ ≠ 0"),
    ],
)
def test_playground_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Playground(**values)


def test_assignment_to_a_playground_is_checked():
    playground = Playground()
    with pytest.raises(ValueError, match=r"a has shape \(3,\)"):
        playground.a = [1, 2, 3]


def test_notebook_gets_the_live_playground_only():
    data, _ = Playground()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "text/html" not in data


@pytest.mark.usefixtures("book")
def test_page_gets_the_playground_and_a_picture():
    data, _ = Playground(a=[1, 0], applied=False)._repr_mimebundle_()
    state, fallback = parts(data["text/html"])
    assert state == {"W": [[1, 0.5], [-0.3, 0.9]], "a": [1, 0], "d": [-0.6, 1], "applied": False}
    assert 'role="img"' in fallback


# --- one attention head


def test_attention_head_is_a_block_of_the_library():
    head = AttentionHead(tokens=torch.eye(2), query=[3, 4], W=[[2, 0], [0, 1]])
    assert head.tokens == [[1, 0], [0, 1]]
    parts = np.exp(np.array([25, 3, 4]) / np.sqrt(2) - 25)
    wanted = parts / parts.sum() @ np.array([[3, 4], [1, 0], [0, 1]]) * [2, 1]
    tokens, query = (torch.tensor(value, dtype=torch.float64) for value in (head.tokens, head.query))
    np.testing.assert_allclose(head.block()(tokens, query), wanted, rtol=1e-13)
    head.uniform = True
    np.testing.assert_allclose(head.block()(tokens, query), [8 / 3, 5 / 3], rtol=1e-13)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokens": []}, r"tokens is \[\]: give 1 to 8 pairs"),
        ({"tokens": np.zeros((9, 2))}, "give 1 to 8 pairs"),
        ({"tokens": 3}, "tokens is 3: give 1 to 8 pairs"),
        ({"tokens": [[1, 2], [1, 2, 3]]}, r"tokens\[1\] has shape \(3,\)"),
        ({"query": [0, 0]}, "query is zero: the theorem needs a₀ ≠ 0"),
        ({"other": [float("inf"), 0]}, r"other\[0\] is not finite"),
    ],
)
def test_attention_head_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        AttentionHead(**values)


@pytest.mark.usefixtures("book")
def test_page_gets_the_attention_head_and_a_picture():
    state, fallback = parts(AttentionHead(tokens=[[1, 2]])._repr_mimebundle_()[0]["text/html"])
    assert (state["tokens"], state["uniform"]) == ([[1, 2]], False)
    assert 'role="img"' in fallback


# --- the puzzle


def test_puzzle_keeps_texts_in_one_form():
    puzzle = Puzzle(examples=" 2 + 3 = 10,4+2=12, ", question="2 + 8", serves=("9+9", "2 +8"))
    assert (puzzle.examples, puzzle.question, puzzle.serves) == ("2+3=10, 4+2=12", "2+8", ["9+9", "2+8"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"examples": ""}, "examples is '': give 1 to 6, such as"),
        ({"examples": ["2+3=10"]}, "examples is .*: give 1 to 6"),
        ({"examples": "1+1=2, " * 7}, "examples is .*: give 1 to 6"),
        ({"examples": "2+3=10, 2*3=6"}, r"examples\[1\] is ' 2\*3=6': write it as '2\+3=10'"),
        ({"examples": "2+3=100"}, "whole numbers from 0 to 99"),
        ({"question": "02+8"}, "question is '02\\+8': write it as '2\\+8', .* without leading zeros"),
        ({"question": None}, "question is None"),
        ({"serves": "2+8"}, r"serves is '2\+8': give a list"),
        ({"serves": ["2+8", "x"]}, r"serves\[1\] is 'x'"),
        ({"serves": ["2+8", "2 + 8"]}, r"serves has '2\+8' twice"),
    ],
)
def test_puzzle_refuses(values, message):
    with pytest.raises(ValueError, match=message):
        Puzzle(**values)
    puzzle, ((name, value),) = Puzzle(), values.items()
    before = getattr(puzzle, name)
    with pytest.raises(ValueError, match=message):
        setattr(puzzle, name, value)
    assert getattr(puzzle, name) == before


def test_notebook_gets_the_puzzle_with_its_model():
    puzzle = Puzzle()
    assert len(puzzle.weights) > 800_000
    assert puzzle.config["num_hidden_layers"] == 4
    assert "text/html" not in puzzle._repr_mimebundle_()[0]
    inside = module("puzzle")
    assert re.findall(r"^(?:import|export) .*", inside, re.MULTILINE) == ["export default { render };"]
    assert (STATIC / "language_model.mjs").read_text().splitlines()[-1].removeprefix("export default") in inside


@pytest.mark.usefixtures("book")
def test_page_gets_the_puzzle_without_the_model():
    puzzle = Puzzle(serves=["2+8"])
    state, fallback = parts(puzzle._repr_mimebundle_()[0]["text/html"])
    assert state == {"examples": "2+3=10, 4+2=12, 1+5=12", "question": "2+8", "serves": ["2+8"]}
    assert "2+8 = ?" in fallback
    assert not puzzle.weights


# --- what every widget puts into a page


def test_state_cannot_end_its_script():
    evil = {"text": "</script><script>alert(1)</script><!-- <script>"}
    state, _ = parts(page_html("explore", evil, ""))
    assert state == evil
    assert page_html("explore", evil, "").count("<script") == 3
    assert "<!--" not in page_html("explore", evil, "")


def test_state_has_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        page_html("explore", {"x": float("nan")}, "")
