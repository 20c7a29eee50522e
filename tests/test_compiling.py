"""The comparison of compiled prompts in miniature: its baselines, its questions, its summary and its pictures."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import relative
from language import same, state

from icl_lib.paper import plots
from icl_lib.paper.compiling import (
    TASKS,
    Comparison,
    behind_prompt,
    chosen,
    comparison,
    corrected,
    distilled,
    linear_share,
    run_comparison,
    summarise,
    without_prompt,
    write_comparison,
)
from icl_lib.paper.experiments import small_language_model


def toy(dtype=torch.float64):
    return small_language_model("Llama", dtype, blocks=2, max_position_embeddings=512)


class Words:
    """A tokenizer: one token for each word and each new line."""

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [sum(word.encode()) % 96 + 1 for word in re.findall(r"\n|[^\s]+", text)]}

    def decode(self, ids):
        return "".join("\n" if i == 11 else f" {i}" for i in ids.tolist())


def drawn(*lengths):
    prompt, *queries = torch.randperm(96).split([12, *lengths, 96 - 12 - sum(lengths)])
    return prompt, queries[:-1]


def test_what_is_asked_of_a_prompt_is_what_the_model_answers_to_the_whole_text():
    model, (prompt, queries) = toy(), drawn(3, 1, 2)
    answers = behind_prompt(model, prompt, queries)
    for query, answer in zip(queries, answers, strict=True):
        assert relative(model(torch.cat([prompt, query])[None]).logits[0, -1], answer) < 1e-12
    assert relative(without_prompt(model, prompt, queries, 2), answers) > 1e-2
    assert relative(without_prompt(model, prompt, queries, len(prompt)), answers) < 1e-12  # all is kept


@pytest.mark.parametrize(("ridge", "lengths"), [(None, [1]), (1e-13, [3, 2, 4])])
def test_a_correction_is_exact_where_it_can_be(ridge, lengths):
    model, (prompt, queries) = toy(), drawn(*lengths)
    before, bare, other = state(model), without_prompt(model, prompt, queries, 2), [queries[0].flip(0), queries[-1] + 1]
    wanted, others = (behind_prompt(model, prompt, asked) for asked in (queries, other))
    with corrected(model, prompt, queries, 2, ridge) as edited:
        assert relative(without_prompt(edited, prompt, queries, 2), wanted) < 1e-7  # no more, because of the ridge
        assert relative(without_prompt(edited, prompt, other, 2), others) > 1e-2  # it is a fit for other questions
    assert same(before, state(model))
    assert torch.equal(without_prompt(model, prompt, queries, 2), bare)
    assert relative(bare, wanted) > 1e-2


def test_the_linear_share_is_that_of_each_text_read_alone():
    model, (prompt, queries) = toy(), drawn(3, 2, 4, 3, 2)
    found = linear_share(model, prompt, queries[:3], queries[3:], 2)
    norm, reads = model.model.layers[1].post_attention_layernorm, []
    hook = norm.register_forward_hook(lambda _, args, out: reads.append(out[0]))
    positions = [[*range(2), *range(12, 12 + len(query))] for query in queries]
    for query, places in zip(queries, positions, strict=True):
        model(
            torch.cat([prompt[:2], query])[None],
            position_ids=torch.tensor([places]),
            attention_mask=torch.ones(1, len(places)),
        )
        model(torch.cat([prompt, query])[None])
    hook.remove()
    z_0, z_C = (
        torch.cat([one[-len(q) :] for one, q in zip(reads[at::2], queries, strict=True)]).numpy() for at in (0, 1)
    )
    squares = np.sort((z_0[:9] ** 2).sum(1))
    gram = z_0[:9].T @ z_0[:9] + squares[(9 - 1) // 2] * np.eye(z_0.shape[1])
    M = np.linalg.solve(gram, z_0[:9].T @ (z_C - z_0)[:9])
    for name, at in (("fitted", slice(9)), ("held out", slice(9, None))):
        change = (z_C - z_0)[at]
        assert found[name][1] == pytest.approx(1 - ((change - z_0[at] @ M) ** 2).sum() / (change**2).sum(), abs=1e-4)
    assert found["fitted"][1] > found["shuffled"][1]
    assert plots.linear_shares(found).alt.startswith("Share of the prompt's change")


def test_distillation_comes_nearer_and_leaves_the_model():
    model, (prompt, queries) = toy(torch.float32), drawn(3, 2, 4)
    before, wanted = state(model), behind_prompt(model, prompt, queries).softmax(-1)
    off = []
    for steps in (0, 30):
        with distilled(model, prompt, queries, 2, steps=steps, rate=1e-2) as student, torch.no_grad():
            off.append((without_prompt(student, prompt, queries, 2).softmax(-1) - wanted).norm())
    assert off[1] < off[0] / 2
    assert same(before, state(model))


def test_the_tasks_have_enough_questions_and_no_question_is_used_twice():
    for task in TASKS.values():
        questions = [question for question, _ in task.pairs]
        assert len(set(questions)) == len(questions) >= 116
        split = task.split(seed=3)
        asked = [*split.calibration, *split.held_out]
        assert len(set(asked)) == 104
        assert not any(question in split.prompt for question in asked if task.name == "sentiment")
        assert split == task.split(seed=3) != task.split(seed=4)
    with pytest.raises(ValueError, match="held_out is 400, with 8 examples and 64 questions to calibrate on"):
        TASKS["capitals"].split(0, held_out=400)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(comparison, "_model", lambda name: (toy(torch.float32), Words()))
    comparison._asked.cache_clear()
    yield
    comparison._asked.cache_clear()


def test_runs_are_stored_and_summarised(tiny, tmp_path):
    one = Comparison(task="opposites", held_out=6)
    settings = [
        replace(one, method="bare"),
        *(replace(one, queries=4, seed=seed) for seed in (1, 2)),
        replace(one, queries=4, of="another task"),
        replace(one, queries=4, method="vector"),
    ]
    result = write_comparison(tmp_path, tmp_path / "summary.json", settings, progress=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == result
    bare, compiled, _, _ = result["runs"]
    assert (compiled["seeds"], bare["seeds"], compiled["tasks"]) == ([1, 2], [1], 1)
    assert compiled["numbers"] > bare["numbers"] == 0
    for run in result["runs"]:
        for name in ("accuracy", "agreement", "kl"):
            mean, low, high = run[name]
            assert low <= mean <= high
    assert bare["kl"][0] > 0
    assert np.isfinite(compiled["kl"][0])
    more = write_comparison(tmp_path, tmp_path / "summary.json", [replace(one, queries=4, guard=True)], progress=False)
    assert more["runs"][:-1] == result["runs"]  # what was stored stays
    assert more["runs"][-1]["settings"]["guard"] is True
    assert more["runs"][-1]["kl"] != compiled["kl"]


def test_a_system_prompt_is_compiled_with_the_replies(tiny):
    one = Comparison(task="pirate", queries=16, keep=1, held_out=3, answers=12)
    ours, bare = (run_comparison(replace(one, method=method)) for method in ("compiled", "bare"))
    assert ours["prompted"] == [1.0] * 3  # right is what the prompted model itself writes
    assert len(ours["kl"]) == 3
    assert np.mean(ours["kl"]) < np.mean(bare["kl"])
    assert run_comparison(replace(one, method="distilled", steps=1, rate=1e-3))["kl"] != bare["kl"]
    assert run_comparison(replace(one, answers=0))["kl"] != ours["kl"]
    asked = comparison._asked("SmolLM2", "pirate", 1, 3)
    answers = behind_prompt(toy(torch.float32), asked.prompt, asked.held_out, asked.last)
    assert torch.equal(answers.argmax(-1), asked.right)
    [run] = summarise([{"settings": asdict(one), "result": ours}])
    assert chosen([run], "system prompts", queries=16, keep=1, held_out=3, answers=12) is run


def greedy(model, ids, positions, count):
    """The likeliest tokens, one after the other, each from a pass of its own."""
    ids, positions = list(ids), list(positions)
    for _ in range(count):
        call = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([positions])}
        ids.append(model(**call, attention_mask=torch.ones(1, len(ids)), use_cache=False).logits[0, -1].argmax().item())
        positions.append(positions[-1] + 1)
    return ids[-count:]


def test_text_is_written_by_the_edited_model(tiny):
    one = Comparison(task="opposites", queries=8, held_out=3, written=5, method="bare")
    bare, compiled, calibrated = (
        run_comparison(settings)
        for settings in (one, replace(one, method="compiled"), replace(one, method="compiled", answers=5))
    )
    asked, model = comparison._asked("SmolLM2", "opposites", 1, 3, 8, 0, 5), toy(torch.float32)
    behind = len(asked.prompt)
    for number, question in enumerate(asked.questions):
        whole = [*asked.prompt.tolist(), *question.tolist()]
        prompted = greedy(model, whole, range(len(whole)), 5)
        alone = greedy(model, [*whole[:2], *question.tolist()], [0, 1, *range(behind, len(whole))], 5)
        assert asked.written[number].tolist() == prompted
        assert bare["goes_on"][number] == pytest.approx(np.mean(np.array(alone) == prompted))
        if number < 2:
            assert bare["texts"][number][1:] == [Words().decode(torch.tensor(one)) for one in (prompted, alone)]
    assert np.mean(calibrated["goes_on"]) > np.mean(bare["goes_on"])
    assert calibrated["texts"] != compiled["texts"]
    assert not any(bare["answered"])
    [run] = summarise([{"settings": asdict(one), "result": bare}])
    assert run["texts"] == {"opposites": bare["texts"]}
    assert run["goes_on"] == pytest.approx(np.mean(bare["goes_on"]), rel=1e-3)


def test_lines_are_read_as_answers_and_as_examples(tiny):
    settings = Comparison(task="capitals", held_out=2)
    answers = TASKS["capitals"].split(1, held_out=2).answers

    class Letters(Words):
        def decode(self, ids):
            return "".join(map(chr, ids.tolist()))

    def letters(*texts):
        return [torch.tensor([*map(ord, text.ljust(60, "\n"))]) for text in texts]

    prompted = letters(f"{answers[0]}\nJapan -> Tokyo", f"{answers[1]}\nI am")
    said = letters(f"{answers[0]} ->", "Rome\nCuba -> Havana")
    asked = replace(comparison._asked("SmolLM2", "capitals", 1, 2), questions=letters("a ->", "b ->"), written=prompted)
    found = comparison._of_writing(settings, asked, said, Letters())
    assert found["prompted_answered"] == [True, True]
    assert found["prompted_in_form"] == [True, False]
    assert found["answered"] == [False, False]
    assert found["in_form"] == [False, True]


def test_a_wrong_setting_is_named():
    for name in ("method", "task", "of"):
        with pytest.raises(ValueError, match=f"{name} is 'guess': choose one of"):
            run_comparison(replace(Comparison(), **{name: "guess"}))


def record(task, seed, right, prompted):
    result = {"right": right, "prompted": prompted, "agree": right, "kl": [0.5, 1.5], "prompt_tokens": 9}
    settings = asdict(Comparison(task=task, seed=seed))
    return {"settings": settings, "result": {**result, "harm": 2.0, "seconds": 3.0, "numbers": 10}}


def test_a_summary_counts_questions_and_finds_the_worst_run():
    [run] = summarise([record("capitals", 1, [1, 0], [1, 1]), record("French", 1, [1, 1], [1, 0])])
    assert (run["accuracy"][0], run["prompted"][0], run["kl"][0], run["share"]) == (0.75, 0.75, 1.0, 1.0)
    assert run["worst"] == 0.5
    assert run["by_task"]["capitals"]["accuracy"] == 0.5
    assert run["accuracy"][1] < 0.75 < run["accuracy"][2]
    [same_everywhere] = summarise([record("capitals", seed, [1, 1], [1, 1]) for seed in (1, 2)])
    assert same_everywhere["accuracy"] == [1.0, 1.0, 1.0]


def test_the_pictures_say_what_they_show():
    found = summarise([record(task, seed, [1, 0], [1, 1]) for task in ("capitals", "French") for seed in (1, 2)])[0]
    by_task = plots.accuracy_by_task({"compiled": found, "bare": found})
    assert "capitals: prompt 1.00, compiled 0.50, bare 0.50" in by_task.alt
    over = plots.divergence_by([1, 4], [found, found], found, "calibration questions", {"vector": found})
    assert over.alt.endswith("1: 1; 4: 1. Bare question 1, vector 1.")
    timed = plots.divergence_over_time({"compiled": {"4": (1.5, 0.8)}, "trained": {"10": (9.0, 1.0)}}, bare=6.0)
    assert timed.alt.endswith("compiled: 4 0.8 after 1.5 s; trained: 10 1 after 9 s. Bare question 6.")


def test_a_run_is_chosen_by_what_differs_from_the_default():
    runs = summarise([record("capitals", 1, [1, 0], [1, 1])])
    assert chosen(runs) is runs[0]
    with pytest.raises(ValueError, match=r"settings are {'queries': 3}: no run of the kind"):
        chosen(runs, queries=3)


def test_the_stored_runs_have_the_settings_of_this_library():
    stored = json.loads((Path(__file__).resolve().parents[1] / "book/data/compiling.json").read_text())
    assert stored["defaults"] == asdict(Comparison())
    ours, bare, control = (chosen(stored["runs"], **one) for one in ({}, {"method": "bare"}, {"of": "another task"}))
    assert ours["by_task"].keys() == bare["by_task"].keys() == TASKS.keys()
    assert ours["kl"][2] < min(bare["kl"][1], control["kl"][1])  # the intervals are apart
    free, guarded, nothing = (chosen(stored["first_seed"], **one) for one in ({}, {"guard": True}, {"method": "bare"}))
    assert guarded["by_task"].keys() == TASKS.keys()
    assert guarded["harm"] - nothing["harm"] < 0.5 * (free["harm"] - nothing["harm"])
