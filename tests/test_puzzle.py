"""The puzzle in a real browser, on a page of its own: by mouse, touch and keyboard."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser import CONTRASTS, Visit, settle, visiting
from playwright.sync_api import Browser, Locator, expect
from widgets_page import widgets_page

from icl_lib.paper.hidden_rule import RULES
from icl_lib.widgets.page import page_html

EXACT = 1e-12
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
START = {"examples": "2+3=10, 4+2=12, 1+5=12", "question": "2+8", "serves": []}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return widgets_page(tmp_path_factory.mktemp("puzzle"), page_html("puzzle", START, "<p>2+8 = ?</p>"), model=True)


@pytest.fixture
def visit(browser: Browser, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    with visiting(browser, address, **getattr(request, "param", {})) as visit:
        visit.page.goto(f"{address}/index.html")
        settle(visit.page)
        yield visit
        assert visit.problems() == []


@pytest.fixture
def puzzle(visit: Visit) -> Locator:
    return visit.page.locator(".icl-puzzle")


def answers(puzzle: Locator) -> list[list[str]]:
    """Of each column: the answers with their probabilities, the most likely first."""
    return [[item.inner_text() for item in column.locator("li").all()] for column in puzzle.locator("ol").all()]


def first(puzzle: Locator) -> list[str]:
    """The most likely answer of each column."""
    return [column.locator("b").first.inner_text() for column in puzzle.locator("ol").all()]


def verdict(puzzle: Locator) -> str:
    return puzzle.locator(".icl-verdict").inner_text()


def ask(puzzle: Locator, question: str) -> None:
    puzzle.get_by_role("group", name="Ask").get_by_role("button", name=question, exact=True).click()


def residual(puzzle: Locator) -> float:
    """The largest difference of the probabilities that the puzzle prints."""
    printed = verdict(puzzle).partition("differ by at most ")[2].partition(",")[0].split()
    assert printed, "no edit serves the question"
    return (
        float(printed[0]) * 10.0 ** int(printed[2][2:].translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")))
        if printed[1:]
        else 0.0
    )


def ranks(puzzle: Locator) -> set[str]:
    """What the twelve matrices say of their edits: the rank, without their names and norms."""
    labels = [radio.get_attribute("aria-label") for radio in puzzle.get_by_role("radio").all()]
    assert len(labels) == 12
    return {label.partition(": ")[2].partition(",")[0] for label in labels}


def test_the_examples_move_into_the_weights_and_back(puzzle, visit):
    before = answers(puzzle)
    assert first(puzzle) == ["20", "7", "?"]
    assert ranks(puzzle) == {"not edited"}
    puzzle.get_by_role("switch").focus()
    visit.page.keyboard.press("Space")
    after = answers(puzzle)
    assert after[2] == after[0] == before[0]
    assert after[1] == before[1] != before[0]
    assert residual(puzzle) < EXACT
    assert ranks(puzzle) == {"rank 1"}
    visit.page.keyboard.press("Space")
    assert answers(puzzle) == before
    assert ranks(puzzle) == {"not edited"}


# Press each preset, move its examples, ask each of its questions, then make one edit for the first two and ask them.
TOUR = """(root) => {
  const buttons = (name) => [...root.querySelectorAll(`[aria-label="${name}"] button`)];
  const read = () => ({
    columns: [...root.querySelectorAll("ol")].map((list) => list.firstChild.innerText.split(/\\s*\\n\\s*/)),
    verdict: root.querySelector(".icl-verdict").innerText,
    ranks: [...root.querySelectorAll("[type=radio]")].map((radio) => radio.ariaLabel.split(/: |,/).at(-2)),
  });
  const toggle = root.querySelector("[role=switch]");
  return buttons("Hidden rule").map((preset, n) => {
    if (toggle.checked) toggle.click();
    buttons("Hidden rule")[n].click();
    toggle.click();
    const asked = buttons("Ask").map((button) => button.innerText);
    const alone = asked.map((_, k) => (buttons("Ask")[k].click(), read()));
    buttons("Ask")[1].click();
    root.querySelector(".icl-main").click();
    return { asked, alone, both: [0, 1].map((k) => (buttons("Ask")[k].click(), read())) };
  });
}"""


def test_each_preset_shows_that_an_edit_serves_its_own_question_only(puzzle):
    """The model is sure and right, and answers something else without examples; only the first question is served."""
    tour = puzzle.evaluate(TOUR)
    for name, shown in zip(("2(a+b)", "3(a+b)", "|a-b|", "2a+b", "a+2b"), tour, strict=True):
        (rule,) = (rule for rule in RULES if str(rule) == name)
        assert len(shown["asked"]) == 4
        for question, seen in zip(shown["asked"], shown["alone"], strict=True):
            (wanted, chance), (bare, _), (edited, _) = seen["columns"]
            assert wanted == str(rule(*map(int, question.split("+"))))
            assert float(chance.replace("\u00a0", "").strip(">%")) > 98
            assert seen["ranks"] == ["rank 1"] * 12
            if question == shown["asked"][0]:
                assert seen["columns"][2] == seen["columns"][0]
            else:
                assert edited != wanted, "the control: the edit made for another question serves this one"
                assert bare != wanted
                assert f"For {question} it fails: the answer is {edited}" in seen["verdict"]
        for seen in shown["both"]:
            assert seen["columns"][2] == seen["columns"][0]
            assert seen["ranks"] == ["rank 2"] * 12
            assert "differ by at most" in seen["verdict"]


def test_one_edit_is_made_for_two_questions_and_again_for_one(puzzle):
    puzzle.get_by_role("switch").check()
    ask(puzzle, "9+9")
    puzzle.get_by_role("button", name="Make one edit for 2+8 and 9+9").click()
    expect(puzzle.get_by_role("group", name="Ask").get_by_role("button", name="9+9", exact=True)).to_be_focused()
    assert residual(puzzle) < EXACT
    puzzle.get_by_role("button", name="Only for 9+9").click()
    assert ranks(puzzle) == {"rank 1"}
    assert first(puzzle) == ["36", "4", "36"]


def test_readers_write_their_own_examples_and_questions(puzzle, visit):
    keyboard = visit.page.keyboard
    chips, alert = puzzle.locator(".icl-chip"), puzzle.get_by_role("alert")
    puzzle.get_by_role("switch").check()
    puzzle.get_by_role("button", name="change the examples").click()
    field = puzzle.get_by_label("examples, separated by commas")
    for wrong, message in (
        ("2*3=6", "“2*3=6” is no example: write one as 2+3=10."),
        ("2+3=100", "100 is no token: write a whole number from 0 to 99"),
        ("1+1=2, " * 7, "Write at most 6 examples"),
        (" ", "Write at least one example"),
    ):
        field.fill(wrong)
        keyboard.press("Enter")
        assert message in alert.inner_text()
        assert first(puzzle) == ["20", "7", "20"], "a mistake must change nothing"
    keyboard.press("Escape")
    expect(puzzle.get_by_role("button", name="change the examples")).to_be_focused()
    assert alert.count() == 0
    puzzle.get_by_role("button", name="change the examples").click()
    field.fill("1+2=6,3+5=11, 7 + 4 = 14")
    keyboard.press("Enter")
    assert chips.all_inner_texts() == ["1+2=6", "3+5=11", "7+4=14"]
    question = puzzle.get_by_label("question", exact=True)
    question.fill("6+7 =")
    keyboard.press("Enter")
    assert first(puzzle)[0] == "16"
    assert first(puzzle)[2] != "16"
    question.fill("6-7")
    keyboard.press("Enter")
    assert "is no question" in alert.inner_text()
    assert question.input_value() == "6+7"
    puzzle.get_by_role("button", name="Make one edit for 2+8 and 6+7").click()
    assert first(puzzle)[2] == "16"


def test_the_matrices_are_enlarged_by_keyboard_and_mouse(puzzle, visit):
    caption = puzzle.locator(".icl-product + p")
    puzzle.get_by_role("switch").check()
    seen = [caption.inner_text()]
    assert "Block 2, matrix “gate”: the edit is one column times one row (rank 1)" in seen[0]
    puzzle.get_by_role("radio", checked=True).focus()
    visit.page.keyboard.press("ArrowRight")
    seen.append(caption.inner_text())
    assert "Block 2, matrix “up”" in seen[1]
    puzzle.locator(".icl-block label").last.hover()
    assert "Block 4, matrix “down”" in caption.inner_text()
    visit.page.mouse.move(0, 0)
    assert caption.inner_text() == seen[1]
    ink = "(canvas) => canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.some((x) => x > 60)"
    assert all(canvas.evaluate(ink) for canvas in puzzle.locator("canvas").all())


def test_the_map_asks_every_question(puzzle):
    """The number of questions that the edit serves is counted, and there are others: the negative control."""
    cells, count = puzzle.locator(".icl-map span"), puzzle.locator(".icl-map + p")
    assert not count.is_visible()
    puzzle.get_by_role("switch").check()
    served = []
    for made in ("2+8", "9+9"):
        ask(puzzle, made)
        if made == "9+9":
            puzzle.locator(".icl-main").click()
        expect(count).to_contain_text("Of the 81 questions", timeout=20_000)
        same = cells.evaluate_all(
            "(cells) => cells.filter((cell) => cell.className.includes('icl-same')).map((c) => c.title)"
        )
        served.append(len(same))
        assert count.inner_text().startswith("Of the 81 questions from 1+1 to 9+9, the edited model answers ")
        assert count.inner_text().endswith(f" {len(same)} as with the examples (green).")
        assert len(puzzle.locator(".icl-made").all()) == len(served)
        assert puzzle.locator(".icl-made:not(.icl-same)").count() == 0
    assert 1 < served[0] < 81
    ask(puzzle, "5+1")
    cells.nth(7).click()
    assert puzzle.get_by_label("question", exact=True).input_value() == "1+8"


def test_the_time_of_a_move(puzzle, capsys):
    """Printed, not judged: from the switch to the new answers, edits and pictures; the browser paints after that."""
    timed = """(toggle) => Array.from({ length: 20 }, () => {
      const start = performance.now();
      toggle.click();
      return performance.now() - start;
    }).filter((_, n) => n % 2 === 0).sort((a, b) => a - b)"""
    devtools = puzzle.page.context.new_cdp_session(puzzle.page)
    for slower in (1, 4):
        devtools.send("Emulation.setCPUThrottlingRate", {"rate": slower})
        times = puzzle.get_by_role("switch").evaluate(timed)
        with capsys.disabled():
            print(f"\nthe examples moved, {slower} × slower: {times[0]:.0f} to {times[5]:.0f} ms")


def test_the_examples_can_be_dragged_onto_the_blocks(puzzle, visit):
    mouse, chip = visit.page.mouse, puzzle.locator(".icl-chip").first
    for place, moved in ((puzzle.locator("ol").first, False), (puzzle.locator(".icl-blocks"), True)):
        box, to = chip.bounding_box(), place.bounding_box()
        mouse.move(box["x"] + 9, box["y"] + 9)
        mouse.down()
        mouse.move(to["x"] + to["width"] / 2, to["y"] + to["height"] / 2, steps=4)
        mouse.up()
        assert puzzle.get_by_role("switch").is_checked() == moved
    assert first(puzzle) == ["20", "7", "20"]


def test_the_examples_fly_unless_motion_is_to_be_reduced(puzzle, visit):
    visit.page.emulate_media(reduced_motion="reduce")
    puzzle.get_by_role("switch").check()
    assert puzzle.locator(".icl-ghost").count() == 0
    visit.page.emulate_media(reduced_motion="no-preference")
    puzzle.get_by_role("switch").uncheck()
    assert puzzle.locator(".icl-ghost").count() == 3
    expect(puzzle.locator(".icl-ghost")).to_have_count(0)


def test_what_changes_is_announced(puzzle):
    live = puzzle.locator("[aria-live=polite]")
    assert live.text_content() == ""
    puzzle.get_by_role("switch").check()
    expect(live).to_contain_text("with the examples: 20, 99.6\u00a0%. without: 7, 99.7\u00a0%. edited weights: 20")
    ask(puzzle, "9+9")
    expect(live).to_contain_text("For 9+9 it fails: the answer is 4, as without the examples, and not 36.")


@pytest.mark.parametrize("visit", [PHONE], indirect=True)
def test_a_finger_can_use_everything_on_a_phone(puzzle, visit):
    puzzle.locator(".icl-switch").tap()
    puzzle.get_by_role("button", name="9+9").tap()
    assert first(puzzle) == ["36", "4", "4"]
    puzzle.get_by_role("button", name="Make one edit").tap()
    assert first(puzzle) == ["36", "4", "36"]
    puzzle.locator(".icl-block label").last.tap()
    assert "Block 4, matrix “down”" in puzzle.locator(".icl-product + p").inner_text()
    puzzle.get_by_role("button", name="change the examples").tap()
    for target in puzzle.locator("button, input[type=text], .icl-switch, .icl-block label").all():
        box = target.bounding_box()
        assert min(box["height"], box["width"]) >= 43.9, target.inner_text()
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 390


def test_it_is_readable_in_all_colours(puzzle, visit):
    puzzle.get_by_role("switch").check()
    ask(puzzle, "9+9")
    for forced in ("none", "active"):  # the dark theme is that of the book, and tested there
        visit.page.emulate_media(forced_colors=forced)
        assert [text for text, ratio in puzzle.evaluate(CONTRASTS) if ratio < 4.5] == []
        pressed = puzzle.get_by_role("button", name="9+9", exact=True)
        other = puzzle.get_by_role("button", name="2+8", exact=True)
        ground = "(node) => getComputedStyle(node).backgroundColor"
        assert pressed.evaluate(ground) != other.evaluate(ground)
