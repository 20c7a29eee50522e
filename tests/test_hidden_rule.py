"""The puzzle with a hidden rule, the enumeration behind it, and the model that was trained on it."""

import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from icl_lib.paper.hidden_rule import (
    ANSWERS,
    HELD_OUT,
    PAIRS,
    RULES,
    VOCABULARY,
    HiddenRuleSettings,
    HiddenRuleTrainer,
    Rule,
    accuracy,
    agreeing,
    ambiguous,
    best_accuracy,
    build,
    export,
    identified,
    load_hidden_rule,
    losses,
    measure,
    measure_edited,
    measure_swapped,
    posterior,
    replies,
    sample_prompts,
    save_hidden_rule,
    train_hidden_rule,
)
from icl_lib.paper.hidden_rule.__main__ import main
from icl_lib.paper.hidden_rule.checkpoint import DATA
from icl_lib.paper.hidden_rule.evaluation import BATCH, MOST_QUESTIONS, _draw
from icl_lib.paper.sweep import Checkpoint

PUZZLE, QUERY = "2+3=10, 4+2=12, 2+8=", "2+8="
SMALL = HiddenRuleSettings(width=16, blocks=1, heads=2, hidden=16, examples=3, steps=30, batch=32, every=10)

# The rules once more, in plain Python: what a reader would write down from the names in the book.
ORACLE = {
    (form, constant): (lambda a, b, f=function, c=constant: f(a, b) + c)
    for form, function in {
        "a+b": lambda a, b: a + b,
        "2(a+b)": lambda a, b: a + b + a + b,
        "3(a+b)": lambda a, b: a + b + a + b + a + b,
        "2a+b": lambda a, b: a + a + b,
        "a+2b": lambda a, b: a + b + b,
        "|a-b|": lambda a, b: max(a, b) - min(a, b),
    }.items()
    for constant in range(5)
}
GRID = [(a, b) for a in range(1, 10) for b in range(1, 10)]


@pytest.fixture(scope="module")
def model():
    return load_hidden_rule()


def read(tokens):
    """A prompt as text, taken apart without the vocabulary: its examples, and its query."""
    found = re.findall(r"(\d+)\+(\d+)=(\d*)", tokens)
    *examples, query = [tuple(int(number) for number in one if number) for one in found]
    return examples, query


def candidates(examples):
    return [rule for rule in ORACLE.values() if all(rule(a, b) == answer for a, b, answer in examples)]


def test_the_rules():
    assert [(rule.form, rule.constant) for rule in RULES] == list(ORACLE)
    assert PAIRS.tolist() == [list(pair) for pair in GRID]
    for rule, oracle, answers in zip(RULES, ORACLE.values(), ANSWERS.tolist(), strict=True):
        assert answers == [oracle(a, b) for a, b in GRID] == [rule(a, b) for a, b in GRID]
    assert ANSWERS.min() >= 0
    assert ANSWERS.max() < VOCABULARY.numbers
    assert len({tuple(answers) for answers in ANSWERS.tolist()}) == len(RULES)  # no two are the same rule
    assert len(set(ANSWERS[:, GRID.index((2, 8))].tolist())) > 20  # to one query there are many answers
    with pytest.raises(ValueError, match=re.escape("form is 'ab': choose one of a+b, 2(a+b)")):
        Rule("ab")
    with pytest.raises(ValueError, match="constant is -1"):
        Rule("a+b", -1)


def test_the_vocabulary_takes_text_apart_and_puts_it_together():
    ids = VOCABULARY.encode(PUZZLE)
    assert ids.tolist() == [2, 100, 3, 101, 10, 102, 4, 100, 2, 101, 12, 102, 2, 100, 8, 101]
    assert VOCABULARY.decode(ids) == PUZZLE
    assert VOCABULARY.decode(ids[:12]) + VOCABULARY.decode(ids[12:]) == PUZZLE
    assert VOCABULARY.encode(" 2 +3= 10,4+2=12 ,2+8=").tolist() == ids.tolist()
    assert VOCABULARY.size == len(VOCABULARY.tokens) == 103
    generator = random.Random(0)
    for _ in range(200):
        some = [generator.randrange(VOCABULARY.size) for _ in range(generator.randrange(1, 12))]
        assert VOCABULARY.encode(VOCABULARY.decode(some)).tolist() == some


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2+3=10; 2+8=", "text[6] is ';': write numbers and the signs + = , only"),
        ("2+3=10, 2−8=", "text[9] is '−': write numbers"),
        ("2+100=", "text[2:5] is 100: write a whole number from 0 to 99"),
        ("2+08=", "text[2:4] is 08: write a whole number from 0 to 99, without leading zeros."),
        ("  ", "text is '  ': give a prompt"),
        (None, "text is None: give a prompt"),
    ],
)
def test_text_that_is_no_prompt(text, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        VOCABULARY.encode(text)


@pytest.mark.parametrize(
    ("ids", "says"), [([2, 103], "ids[1] is 103: give ids from 0 to 102."), ([-1], "ids[0] is -1")]
)
def test_ids_that_are_no_tokens(ids, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        VOCABULARY.decode(ids)


@pytest.mark.parametrize("query", ["training", "held out"])
def test_prompts_follow_their_rule(query):
    prompts = sample_prompts(300, 4, seed=1, query=query)
    for rule, tokens, answer in zip(prompts.rule, prompts.tokens, prompts.answer, strict=True):
        examples, asked = read(VOCABULARY.decode(tokens))
        oracle = list(ORACLE.values())[rule]
        assert all(oracle(a, b) == value for a, b, value in examples)
        assert oracle(*asked) == answer
        assert len({*(one[:2] for one in examples), asked}) == 5  # a pair is never asked after it was shown
        held = HELD_OUT[rule].tolist()
        assert not any(held[GRID.index(one[:2])] for one in examples)
        assert held[GRID.index(asked)] == (query == "held out")
    assert (prompts.tokens == prompts.answered[:, :-1]).all()
    assert (prompts.answered[:, -1] == prompts.answer).all()
    assert prompts.tokens.shape == (300, prompts.context_length + 4)
    assert set(sample_prompts(3000, 0, seed=2).rule.tolist()) == set(range(len(RULES)))


def test_prompts_follow_their_seed():
    first, again, other = (sample_prompts(5, 3, seed).tokens for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_is_held_out():
    held = HELD_OUT.view(len(RULES), 9, 9)
    assert torch.equal(held, held.mT)
    assert (held.triu().sum((1, 2)) == 3).all()
    double = RULES.index(Rule("2(a+b)"))
    assert [bool(held[double, a - 1, b - 1]) for a, b in ((2, 3), (4, 2), (2, 8), (8, 2))] == [False, False, True, True]
    for answers, mask in zip(ANSWERS, HELD_OUT, strict=True):
        assert set(answers[~mask].tolist()) == set(answers.tolist())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((0, 2, 0), "count is 0"),
        ((2, -1, 0), "examples is -1"),
        ((2, 75, 0), "examples is 75, but there are pairs for 74 examples and a query only: give at most 74."),
        ((2, 2, 0, "new"), "query is 'new': choose 'training' or 'held out'."),
    ],
)
def test_prompts_that_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        sample_prompts(*arguments)


@pytest.mark.parametrize("examples", [0, 1, 2, 3])
def test_what_the_examples_tell(examples):
    prompts = sample_prompts(200, examples, seed=3)
    known, agree, sure = posterior(prompts), agreeing(prompts), identified(prompts)
    best = []
    for index, tokens in enumerate(prompts.tokens):
        shown, asked = read(VOCABULARY.decode(tokens))
        left = candidates(shown)
        votes = Counter(rule(*asked) for rule in left)
        wanted = [float(Fraction(votes[number], len(left))) for number in range(VOCABULARY.numbers)]
        assert known[index].tolist() == wanted
        assert int(agree[index].sum()) == len(left)
        assert bool(sure[index]) == (len(left) == 1)
        best.append(max(wanted))
    assert best_accuracy(prompts) == pytest.approx(sum(best) / 200, rel=1e-12)


def test_how_many_prompts_are_ambiguous():
    for examples in (1, 2):
        count = 0
        for shown in combinations(GRID, examples):
            seen = Counter(tuple(rule(a, b) for a, b in shown) for rule in ORACLE.values())
            count += sum(times for times in seen.values() if times > 1)
        assert ambiguous(examples)[0] == count
    assert ambiguous(2) == (count, 30 * 81 * 40)
    with pytest.raises(ValueError, match="examples is 3: choose 0, 1 or 2"):
        ambiguous(3)


def test_two_examples_identify_the_rule_of_the_puzzle():
    examples, query = read(PUZZLE)
    (rule,) = candidates(examples)
    assert rule(*query) == 20
    assert len(candidates(examples[:1])) > 1
    assert len(candidates(examples[1:])) > 1


def test_losses_are_the_cross_entropies_of_answers_and_text():
    model, prompts = build(SMALL), sample_prompts(5, 2, seed=0)
    log = model(prompts.answered).logits.log_softmax(-1)
    by_position = -torch.stack(
        [log[torch.arange(5), at, prompts.answered[:, at + 1]] for at in range(prompts.answered.shape[1] - 1)]
    ).mean(1)
    answers, text = losses(model, prompts.answered)
    torch.testing.assert_close(answers, by_position[[3, 9, 15]])  # in float32, like the model
    others = [at for at in range(16) if at not in (3, 9, 15)]
    torch.testing.assert_close(text, by_position[others].mean())


def test_training_learns_repeats_itself_and_goes_on_where_it_was(tmp_path):
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    whole = train_hidden_rule(SMALL, progress=False)
    again = train_hidden_rule(SMALL, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's generator is untouched
    assert torch.get_num_threads() == threads
    same = [torch.equal(*pair) for pair in zip(whole.model.parameters(), again.model.parameters(), strict=True)]
    assert all(same)
    assert whole.curve == again.curve
    assert [entry["step"] for entry in whole.curve] == [10, 20, 30]
    assert whole.curve[-1]["loss"][2] < whole.curve[0]["loss"][2] - 0.2
    other = train_hidden_rule(HiddenRuleSettings(**{**vars(SMALL), "seed": 1}), progress=False)
    assert other.curve != whole.curve

    checkpoint = Checkpoint(tmp_path / "state.pt")
    stopped = HiddenRuleTrainer(SMALL)
    torch.set_num_threads(1)
    for _ in range(13):
        stopped.advance()
    torch.set_num_threads(threads)
    checkpoint.save(stopped.state_dict())
    resumed = train_hidden_rule(SMALL, checkpoint, progress=False)
    assert resumed.curve == whole.curve
    same = [torch.equal(*pair) for pair in zip(whole.model.parameters(), resumed.model.parameters(), strict=True)]
    assert all(same)
    finished = train_hidden_rule(SMALL, checkpoint, progress=False)  # nothing is left to do
    assert finished.curve == whole.curve
    with pytest.raises(ValueError, match=re.escape("other settings, {'seed': 0}: delete its file")):
        train_hidden_rule(HiddenRuleSettings(**{**vars(SMALL), "seed": 1}), checkpoint, progress=False)


def test_training_that_diverges():
    settings = HiddenRuleSettings(**{**vars(SMALL), "learning_rate": 1e30, "steps": 200})
    with pytest.raises(
        ValueError, match=r"the (loss|gradient) is not finite at step \d+: lower learning_rate, now 1e\+30"
    ):
        train_hidden_rule(settings, progress=False)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        (
            {"width": 20},
            "width is 20 with 4 heads: rotary positions rotate pairs of coordinates; choose a multiple of 8.",
        ),
        ({"learning_rate": 0.0}, "learning_rate is 0.0: give a positive number"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0: give 0 or a positive number"),
        ({"text_weight": float("nan")}, "text_weight is nan"),
        ({"examples": 0}, "examples is 0"),
        ({"fewest": 7}, "fewest is 7, but a prompt has 6 examples, so no answer would enter the loss: give at most 6."),
    ],
)
def test_settings_are_checked(settings, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        HiddenRuleSettings(**settings)


def test_the_puzzle_is_answered_and_the_bare_query_is_not(model):
    assert VOCABULARY.decode(replies(model, VOCABULARY.encode(PUZZLE)[None])) == "20"
    assert VOCABULARY.decode(replies(model, VOCABULARY.encode(QUERY)[None])) != "20"
    # Other examples, another rule: the answer comes from them.
    assert VOCABULARY.decode(replies(model, VOCABULARY.encode("2+3=5, 4+2=6, 2+8=")[None])) == "10"
    assert VOCABULARY.decode(replies(model, VOCABULARY.encode("2+3=1, 4+2=2, 2+8=")[None])) == "6"


@pytest.mark.slow
@pytest.mark.parametrize("query", ["training", "held out"])
def test_the_model_finds_the_rule(model, query):
    two, four, bare = (sample_prompts(2000, examples, 77 + examples, query) for examples in (2, 4, 0))
    sure = identified(two)
    right = replies(model, two.tokens) == two.answer
    assert right[sure].double().mean() >= 0.95
    # Two examples leave several rules now and then, and no model can be right then. Of pairs that it never saw with the
    # rule, it gives these up first.
    assert accuracy(model, two) >= best_accuracy(two) - (0.01 if query == "training" else 0.05)
    assert accuracy(model, four) >= 0.95
    assert accuracy(model, bare) <= best_accuracy(bare) + 0.01  # and no better than the best guess without them


def test_the_model_follows_the_examples_of_another_rule(model):
    swapped = measure_swapped(model, 4, count=2000, seed=5)
    assert swapped["count"] > 1500
    assert swapped["follow"] >= 0.95
    assert swapped["keep"] < 0.02


def test_the_model_goes_on_with_more_examples_of_the_rule(model):
    ids = VOCABULARY.encode(PUZZLE)[None]
    for _ in range(13):
        ids = torch.cat([ids, replies(model, ids)[:, None]], dim=1)
    examples, _ = read(VOCABULARY.decode(ids[0]) + ", 0+0=")
    assert len(examples) == 5
    assert all(answer == 2 * (a + b) for a, b, answer in examples)


def test_the_record_tells_the_truth(model):
    record = json.loads((DATA / "hidden_rule.json").read_text())
    assert (DATA / "hidden_rule.safetensors").stat().st_size < 1_000_000
    assert record["settings"] == vars(HiddenRuleSettings())
    assert record["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    held = [PAIRS[mask].tolist() for mask in HELD_OUT]
    assert record["held_out"] == {str(rule): pairs for rule, pairs in zip(RULES, held, strict=True)}
    assert record["ambiguous"]["2"] == list(ambiguous(2))
    assert record["curve"][-1]["step"] == record["settings"]["steps"]
    for row in record["accuracy"]:
        if row["examples"] in (0, 2):
            now = measure(model, row["examples"], row["query"], row["count"])
            # How a machine sums decides a prompt or two of those where two answers are about as likely.
            assert now.pop("accuracy") == pytest.approx(row.pop("accuracy"), abs=1e-3)
            assert now.pop("accuracy_identified") == pytest.approx(row.pop("accuracy_identified"), abs=1e-3)
            assert now == row


def test_the_model_in_other_precisions(model):
    double = load_hidden_rule(dtype=torch.float64)
    ids = VOCABULARY.encode(PUZZLE)[None]
    assert double.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in double.parameters())
    torch.testing.assert_close(double(ids).logits.float(), model(ids).logits, rtol=1e-3, atol=1e-3)  # float32
    with pytest.raises(ValueError, match=re.escape("dtype is torch.int64: give a floating-point dtype.")):
        load_hidden_rule(dtype=torch.int64)


def test_files_that_are_not_there_or_not_what_they_should_be(tmp_path):
    with pytest.raises(
        ValueError, match=r"folder has no hidden_rule.safetensors, .*: train the model with `python -m icl_lib"
    ):
        load_hidden_rule(tmp_path)
    shutil.copy(DATA / "hidden_rule.safetensors", tmp_path)
    with pytest.raises(
        ValueError, match=r"folder has no hidden_rule.json, .*: train the model with `python -m icl_lib"
    ):
        load_hidden_rule(tmp_path)
    record = tmp_path / "hidden_rule.json"
    record.write_text("{}")
    with pytest.raises(ValueError, match=r"hidden_rule.json is not the record of a trained model: train the"):
        load_hidden_rule(tmp_path)
    shutil.copy(DATA / "hidden_rule.json", record)
    assert load_hidden_rule(tmp_path).dtype == torch.float32
    weights = tmp_path / "hidden_rule.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(
        ValueError, match=r"hidden_rule.json does not belong to hidden_rule.safetensors in the same folder: train"
    ):
        load_hidden_rule(tmp_path)


def test_a_saved_model_loads_as_it_was(tmp_path):
    trainer = train_hidden_rule(SMALL, progress=False)
    save_hidden_rule(trainer, tmp_path / "new", count=50)
    loaded = load_hidden_rule(tmp_path / "new")
    for one, other in zip(trainer.model.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_exported_folder_loads_by_itself(model, tmp_path, capfd):
    folder = export(tmp_path / "gpt")
    assert capfd.readouterr().err == ""  # no progress bar
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = sample_prompts(20, 3, seed=4)
    for tokens in prompts.tokens:
        text = VOCABULARY.decode(tokens)
        assert tokenizer(text)["input_ids"] == tokens.tolist() == tokenizer(text.replace(" ", ""))["input_ids"]
        assert tokenizer.decode(tokens) == text
    assert torch.equal(loaded(prompts.tokens).logits, model(prompts.tokens).logits)
    ids = VOCABULARY.encode(PUZZLE)[None]
    written = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(written[0]).startswith(f"{PUZZLE}20, ")  # and "2" does not end it
    for unknown in ("2*3=", "2+100="):
        with pytest.raises(Exception, match="WordLevel error"):  # the class that `tokenizers` raises
            tokenizer(unknown)
    with pytest.raises(ValueError, match=r"folder is '.*config.json', which is a file"):
        export(folder / "config.json")
    with pytest.raises(ValueError, match=r"which holds a model \(config.json\).*: give a new or an empty folder"):
        export(folder)


def test_the_command_trains_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(quick=True)
    assert "2 examples, query held out: " in capsys.readouterr().out
    record = json.loads((tmp_path / "_build/trial/hidden_rule.json").read_text())
    assert record["settings"]["steps"] == 5


@pytest.mark.slow
def test_the_library_does_not_need_transformers():
    code = "import sys; sys.modules['transformers'] = None; from icl_lib.paper import hidden_rule as h\n"
    code += "h.sample_prompts(2, 2, 0)\ntry: h.build(h.HiddenRuleSettings())\nexcept ImportError as error: print(error)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "transformers is missing: pip install 'icl_lib[llm]'.\n"


def test_three_examples_of_the_puzzle_leave_little_doubt(model):
    text = "2+3=10, 4+2=12, 1+5=12, 2+8="
    examples, query = read(text)
    (rule,) = candidates(examples)
    chances = [model(VOCABULARY.encode(one)[None]).logits[0, -1].softmax(-1) for one in (text, PUZZLE)]
    assert rule(*query) == 20
    assert chances[0][20] >= 0.95 > chances[1][20]


def test_replies_do_not_depend_on_the_batches(model):
    tokens = sample_prompts(BATCH + 3, 3, seed=6).tokens
    assert torch.equal(replies(model, tokens), torch.cat([replies(model, one[None]) for one in tokens]))


def test_an_edit_from_many_questions_serves_new_ones(model):
    few, many = (measure_edited(model, questions, RULES[::6], seed=1) for questions in (1, 46))
    bare = measure_edited(model, 0, RULES[::6], seed=1)
    assert many["right"] > 0.85 > 0.5 > few["right"] > bare["right"]
    assert many["other"] < 0.15  # the edit for another rule
    assert many["prompted"] == few["prompted"] > 0.95
    assert bare["right"] == bare["other"] < 0.15
    with pytest.raises(ValueError, match="questions is 47, but only 46 are left for fitting the edit"):
        measure_edited(model, 47)


def test_an_untrained_model_agrees_with_its_own_prompted_answers_and_is_wrong():
    untrained = build(HiddenRuleSettings()).requires_grad_(False).eval()
    found, bare = (measure_edited(untrained, questions, RULES[::6]) for questions in (46, 0))
    assert found["agree"] > 0.5 > 0.15 > bare["agree"]
    assert max(found["right"], found["prompted"]) < 0.15


def test_no_question_asked_was_shown_or_is_the_mirror_image_of_one():
    generator = torch.Generator().manual_seed(0)
    for rule in RULES:
        prompts, asked = _draw(rule, generator)
        new = {tuple(sorted(PAIRS[pair].tolist())) for pair in asked.pair[:, -1]}
        known = {tuple(sorted(PAIRS[pair].tolist())) for pair in prompts.pair.flatten()}
        assert len(asked.pair) == 30
        assert len(prompts.pair) >= MOST_QUESTIONS
        assert not new & known
        assert torch.equal(prompts.pair[:1, :-1].expand(30, -1), asked.pair[:, :-1])
        assert RULES[asked.rule[0]] == rule
