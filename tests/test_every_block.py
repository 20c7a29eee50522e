"""The second paper's experiments: theory against experiment, the comparison of blocks, runs that stop and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from icl_lib import LowRank, absorb, alignment
from icl_lib.measures import scientific
from icl_lib.paper import plots
from icl_lib.paper.experiments import (
    BLOCK_COLUMNS,
    COLUMNS,
    EveryBlockSettings,
    between_blocks,
    every_block,
    likeness,
    paper_settings,
    renumbered,
    run_every_block,
    summarise,
    within_block,
    write_figures,
)
from icl_lib.paper.sweep import Checkpoint

RUNS = 11  # settings of the command with --quick: eight tasks, and what the figures vary
TINY = EveryBlockSettings(tasks=4, length=6, steps=6)


@pytest.mark.slow
def test_figure_1_at_every_step():
    """The paper's settings, in its precision: the losses agree at each of the 100 steps, the outputs in each block."""
    result = {name: np.array(values) for name, values in run_every_block(EveryBlockSettings()).items()}
    assert result["theory"].shape == (100,)
    assert (np.abs(result["theory"] - result["experiment"]) <= 1e-5 * result["experiment"]).all()
    assert (np.abs(result["patched"] - result["experiment"]) <= 1e-5 * result["experiment"]).all()
    for control in ("bare", "unedited"):
        assert (np.abs(result[control] - result["experiment"]) > 1e-3 * result["experiment"]).mean() > 0.9
    assert result["difference"].shape == (100, 5)
    assert result["difference"].max() <= 1e-12
    assert result["control"].min() > 1e-2
    assert result["second"].max() < 1e-5
    np.testing.assert_allclose(result["frobenius"], result["spectral"], rtol=1e-5)  # rank one
    assert result["experiment"][-10:].mean() < result["experiment"][:3].mean()


def test_measures_are_those_of_the_definition():
    settings = replace(TINY, dtype="float64", tasks=3)
    model, prompts = settings.trainer().model, settings.test_prompts(0)
    measured = every_block.measure_every_block(model, prompts)
    with torch.no_grad():
        loss = (model(prompts.sequence)[:, -1, -1] - prompts.target).square().mean() / 2
        bare = (model(prompts.sequence[:, -1:])[:, -1, -1] - prompts.target).square().mean() / 2
        stream = prompts.sequence
        for block in model.blocks[:-1]:
            stream = block(stream)
        unedited = (model.blocks[-1](stream[:, -1:])[:, -1, -1] - prompts.target).square().mean() / 2
    assert measured["experiment"] == pytest.approx(loss.item(), rel=1e-12)
    assert measured["theory"] == pytest.approx(loss.item(), rel=1e-12)
    assert measured["bare"] == pytest.approx(bare.item(), rel=1e-12)
    assert measured["patched"] == pytest.approx(loss.item(), rel=1e-12)
    assert measured["unedited"] == pytest.approx(unedited.item(), rel=1e-12)
    assert min(abs(bare - loss), abs(unedited - loss)) > 1e-6
    own, other = ([row[block] for row in (measured["difference"], measured["largest"])] for block in (0, 3))
    for mean, largest in (own, other):
        assert 0 < mean < largest <= mean * 3 * 6 * 3  # prompts, positions, features: no entry exceeds the sum
    dense = absorb(model, prompts.sequence, 5).blocks[2].weight.dense().detach().numpy()
    assert measured["frobenius"][2] == pytest.approx(np.linalg.norm(dense[:, -1], axis=(1, 2)).mean(), rel=1e-10)
    assert measured["spectral"][2] == pytest.approx(np.linalg.norm(dense[:, -1], 2, axis=(1, 2)).mean(), rel=1e-10)
    values = np.linalg.svd(dense.sum(1), compute_uv=False)
    assert measured["second"][2] == pytest.approx((values[:, 1] / values[:, 0]).max(), abs=1e-14)


def test_alignments_against_numpy():
    updates = LowRank(torch.randn(2, 5, 4, 1).double(), torch.randn(2, 5, 3, 1).double())
    flat = updates.dense().flatten(-2).numpy()
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    table = within_block(updates)
    np.testing.assert_allclose(table, flat @ flat.transpose(0, 2, 1), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(between_blocks([updates[:, i] for i in range(5)]), table, rtol=1e-12, atol=1e-14)
    row, column = np.triu_indices(5, 1)
    wanted = [np.corrcoef(table[0][row, column], table[1][row, column])[0, 1]]
    np.testing.assert_allclose(likeness(table[:1], table[1:]), wanted, rtol=1e-12)
    assert alignment(0 * updates[0, 0], updates[0, 1]).isnan()


def test_likeness_with_a_third_table_held_fixed():
    """Partial correlations against NumPy's inverse matrix of correlations; a common part counts only without it."""
    tables = torch.randn(3, 9, 9).double()
    row, column = np.triu_indices(9, 1)
    inverse = np.linalg.inv(np.corrcoef(tables.numpy()[:, row, column]))
    wanted = -inverse[0, 1] / np.sqrt(inverse[0, 0] * inverse[1, 1])
    np.testing.assert_allclose(likeness(*tables), wanted, rtol=1e-9)
    first, second, common = torch.randn(3, 60, 60).double()
    alike = [likeness(first + 3 * common, second + 3 * common, fixed) for fixed in (None, common, first)]
    assert alike[1].abs() < 0.1
    assert min(alike[0], alike[2]) > 0.8


def test_alignment_within_a_block_is_that_of_the_left_factors_alone():
    model, prompts = TINY.trainer().model.double(), TINY.test_prompts(0).sequence.double()
    shared, own = (absorb(model, prompts, 5, reference).blocks[1].weight for reference in ("query", "self"))
    for update, same in ((shared, True), (own[:, 1:], False)):
        left = update.left.squeeze(-1)
        unit = left / left.norm(dim=-1, keepdim=True)
        difference = (within_block(update) - unit @ unit.mT).abs().max()
        assert difference < 1e-12 if same else difference > 1e-2


def test_renumbering_hidden_units_changes_the_alignment_of_blocks_and_nothing_else():
    model, sequence = TINY.trainer().model.double(), TINY.test_prompts(0).sequence.double()
    same = renumbered(model, 2, torch.arange(12).roll(1))
    torch.testing.assert_close(same(sequence), model(sequence), rtol=1e-12, atol=1e-13)
    before, after = (absorb(net, sequence, 5).blocks for net in (model, same))
    tables = [between_blocks([edits.weight[:, -1] for edits in blocks]) for blocks in (before, after)]
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(tables[0][:, kept][:, :, kept], tables[1][:, kept][:, :, kept], rtol=1e-9, atol=1e-11)
    assert (tables[0] - tables[1])[:, 2, kept].abs().max() > 1e-2
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old.outer, new.outer, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(within_block(old.weight), within_block(new.weight), rtol=1e-9, atol=1e-9)
    for index in (0, 1, 3, 4):
        assert torch.equal(model.blocks[index].mlp[0].weight, same.blocks[index].mlp[0].weight)


@pytest.mark.parametrize(
    ("block", "order", "says"),
    [
        (5, torch.randperm(12), "block is 5: give a whole number from 0 to 4"),
        (True, torch.randperm(12), "block is True"),
        (0, torch.randperm(11), "order is not a permutation of the 12 hidden units"),
        (0, torch.zeros(12, dtype=torch.long), "order is not a permutation of the 12 hidden units"),
        (0, list(range(12)), "order is not a permutation of the 12 hidden units"),
    ],
)
def test_bad_renumberings_are_named(block, order, says):
    with pytest.raises(ValueError, match=says):
        renumbered(TINY.trainer().model, block, order)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tasks": 1}, "tasks is 1: give a whole number of at least 2"),
        ({"length": 3}, "length is 3: give a whole number of at least 4"),
        ({"heads": 2}, "heads=2 does not divide the width 3"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_bad_settings_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        EveryBlockSettings(**change)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, monkeypatch):
    whole = run_every_block(TINY)
    measure, seen = every_block.measure_every_block, []

    def stopping(model, prompts):
        seen.append(1)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return measure(model, prompts)

    monkeypatch.setattr(every_block, "measure_every_block", stopping)
    checkpoint = Checkpoint(tmp_path / "run.pt")
    with pytest.raises(KeyboardInterrupt):
        run_every_block(TINY, checkpoint, every=2)
    assert checkpoint.load()["trainer"]["step"] == 4
    assert run_every_block(TINY, checkpoint, every=2) == whole
    assert len(seen) == 6 + 2  # steps 4 and 5, and none before
    assert run_every_block(replace(TINY, seed=1)) != whole


def test_a_run_that_diverges_keeps_what_it_had():
    result = run_every_block(replace(TINY, learning_rate=1e30))
    kept = [value is not None for value in result["experiment"]]
    assert kept[0]
    assert not kept[-1]
    assert kept == sorted(kept, reverse=True)
    assert all([value is not None for value in column] == kept for column in result.values())


def records(results):
    return [
        {"settings": asdict(replace(TINY, seed=seed)), "versions": {"torch": "1"}, "result": result}
        for seed, result in enumerate(results)
    ]


def test_the_summary_against_numpy():
    results = [run_every_block(replace(TINY, seed=seed)) for seed in range(3)]
    [summary] = summarise(records(results))
    assert summary["seeds"] == [0, 1, 2]
    assert summary["diverged"] == []
    for name in (*COLUMNS, *BLOCK_COLUMNS):
        values = np.array([result[name] for result in results])[:, summary[name]["steps"]]
        np.testing.assert_allclose(summary[name]["median"], np.median(values, axis=0), rtol=1e-3)
    assert summary["experiment"]["steps"] == list(range(6))
    assert summary["difference"]["steps"] == [0]
    assert summary["agreement"] < 1e-5


def test_a_diverged_seed_is_counted_and_hides_nothing():
    results = [run_every_block(replace(TINY, seed=seed)) for seed in range(3)]
    whole = summarise(records(results))[0]
    for column in results[2].values():
        column[3:] = [None] * 3
    [summary] = summarise(records(results))
    assert summary["diverged"] == [2]
    assert summary["experiment"]["median"][:3] == whole["experiment"]["median"][:3]
    finite = np.sort([result["experiment"][-1] for result in results[:2]])
    assert summary["experiment"]["median"][-1] == pytest.approx(finite[1], rel=1e-3)  # the middle of two and ∞
    for column in (column for result in results for column in result.values()):
        column[3:] = [None] * 3
    assert summarise(records(results))[0]["experiment"]["median"][3:] == [None] * 3


def test_every_figure_of_the_paper_has_its_runs():
    settings = paper_settings(seeds=2)
    assert len(settings) == len(set(settings)) == 20
    assert EveryBlockSettings(seed=1) in settings
    for name, values in (("norm", ["none", "pre"]), ("tasks", [32, 64, 128, 256, 512]), ("features", [2, 5, 8])):
        assert [replace(EveryBlockSettings(), **{name: value}) in settings for value in values] == [True] * len(values)
    assert all(replace(EveryBlockSettings(), length=length) in settings for length in (51, 101, 1001))


@pytest.mark.slow
def test_figures_are_written_once(tmp_path):
    settings = paper_settings(TINY, seeds=2, varied={"norm": ("none", "pre")})
    first = write_figures(tmp_path / "runs", tmp_path / "data" / "summary.json", settings, workers=1, progress=False)
    assert json.loads((tmp_path / "data" / "summary.json").read_text()) == first
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}
    assert len(files) == 4
    again = write_figures(tmp_path / "runs", tmp_path / "summary.json", settings, workers=1, progress=False)
    assert again == first
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").iterdir()}


@pytest.mark.slow
def test_the_command_survives_kill_9(tmp_path):
    """`make figures`, killed in the middle and started again: what was finished is kept, and each run is there once."""
    folder, summary = tmp_path / "runs", tmp_path / "summary.json"
    command = [sys.executable, "-m", "icl_lib.paper.experiments", "--quick", "--seeds", "1", "--device", "cpu"]
    command += ["--workers", "2", "--folder", str(folder), "--summary", str(summary)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None and len(list(folder.glob("*.json"))) < 2:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    kept = {file.name: file.read_bytes() for file in folder.glob("*.json")}
    assert 2 <= len(kept) < RUNS
    assert not summary.exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("theory and experiment differ by at most") == RUNS
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert len(files) == RUNS
    assert kept.items() <= files.items()
    assert len(json.loads(summary.read_text())["runs"]) == RUNS


def test_the_figure_of_errors_by_depth_tells_both_errors_and_the_control():
    whole, block = {"float64": [2e-16, 9e-16]}, {"float64": [3e-16, 2e-16]}
    alt = plots.errors_by_depth([2, 32], whole, block, [0.3, 2.0], "no norm").alt
    said = [f"whole network from {scientific(2e-16)} to {scientific(9e-16)}", f"one block at most {scientific(3e-16)}"]
    assert f"float64: {', '.join(said)}" in alt
    assert "Without edits at least 0.3" in alt
    larger = plots.errors_by_depth([2, 32], whole, {"float64": [2e-16] * 2}, [1.0, 1.0], "").alt
    assert f"one block at most {scientific(2e-16)}" in larger
