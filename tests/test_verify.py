"""The report: the error of every block and position with its control, in every precision."""

import contextlib
import copy
import itertools
import json
import math
import re
import sys
from dataclasses import replace

import pytest
import torch
from cases import lively

from icl_lib import Report, absorb, verify
from icl_lib.measures import relative_error, scientific

OPTIONS = list(itertools.product([False, True], ["none", "pre", "post"], [False, True], ["query", "self"]))


@pytest.mark.parametrize("width", [8, 64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("skip", "norm", "causal", "reference"), OPTIONS)
def test_six_blocks_hold_to_rounding(width, skip, norm, causal, reference):
    model = lively(dim=width, blocks=6, skip=skip, norm=norm, causal=causal)
    inputs = torch.randn(2, 9, width).double()
    report = verify(model, inputs, 8, reference)
    assert report.tolerance == 1e-12
    assert report.holds, report
    # Without its edit every position fails, except the first token of a causal model with reference "self": it has no
    # context. Without skips, attention makes all tokens nearly equal after some blocks, so only the first block counts.
    start = 1 if causal and reference == "self" else 0
    assert min(value for block in report.control[: 6 if skip else 1] for value in block[start:]) > 1e-6
    assert report.output_control > 1e-6
    single = verify(model.float(), inputs.float(), 8, reference)
    assert (single.tolerance, single.dtype) == (1e-5, "float32")
    assert single.holds, single


def test_errors_are_those_of_a_merged_copy():
    """The report computes with low-rank factors; a copy with edited weights must give the same errors."""
    model, inputs = lively(blocks=3), torch.randn(2, 6, 8).double()
    report = verify(model, inputs, 5)
    patch = absorb(model, inputs, 5)
    wanted = model(inputs)[:, 5:]
    assert relative_error(patch.merged(model)(inputs[:, 5:]), wanted).max() < 1e-12
    control = relative_error(model(inputs[:, 5:]), wanted).min().item()
    assert report.output_control == pytest.approx(control, rel=1e-12)


@contextlib.contextmanager
def wrong_by(factor, monkeypatch):
    """Multiply every ΔW by a factor inside the `with` block."""
    module = sys.modules["icl_lib.models.block_edits"]
    right = module.weight_update
    with monkeypatch.context() as patched:
        patched.setattr(module, "weight_update", lambda *arguments: factor * right(*arguments))
        yield


def test_a_wrong_edit_is_reported(monkeypatch):
    """The check fails for a ΔW that is slightly too large, for ΔW = 0 and for −ΔW."""
    model, inputs = lively(), torch.randn(2, 6, 8).double()
    for factor in (1 + 1e-8, 0.0, -1.0):
        with wrong_by(factor, monkeypatch):
            report = verify(model, inputs, 5)
        assert not report.holds
        assert report.max_error > 1e-10
    assert verify(model, inputs, 5).holds


def test_the_report_as_text_html_and_json():
    report = verify(lively(), torch.randn(2, 6, 8).double(), 5)
    text = str(report)
    assert "Transformer, 3 blocks, 6 positions, 2 prompts, float64 on cpu, reference: query" in text
    assert "The identity holds to 1e-12" in text
    assert len([line for line in text.splitlines() if line.lstrip()[:1] in "123"]) >= 3
    html = report._repr_html_()
    assert html.startswith('<div class="icl-report"')
    assert 'tabindex="0" role="group" aria-label="Verification report"' in html  # the keyboard must reach it
    assert html.count("<tr>") == 4
    assert f"The identity holds to {scientific(1e-12)}" in html
    assert not re.search(r"\de[-+]\d", re.sub(r"<table>.*</table>", "", html, flags=re.DOTALL))
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["holds"] is True
    assert [len(block) for block in data["error"]] == [6] * 3
    fields = {name: value for name, value in data.items() if name not in ("max_error", "holds", "tested")}
    assert Report(**fields) == report


def test_a_report_of_failure_says_so():
    report = verify(lively(), torch.randn(2, 6, 8).double(), 5, tolerance=1e-30)
    assert not report.holds
    assert "The identity FAILS to 1e-30" in str(report)


def test_a_prompt_without_batch_dimensions():
    model, inputs = lively(), torch.randn(6, 8).double()
    report, batched = verify(model, inputs, 5), verify(model, inputs[None, None], 5)
    assert report.prompts == batched.prompts == 1
    assert [len(block) for block in report.error] == [6] * 3
    assert report.control[1] == pytest.approx(batched.control[1], rel=1e-9)
    assert "6 positions, 1 prompt," in str(report)


def test_half_precision(monkeypatch):
    model, inputs = lively(), torch.randn(2, 6, 8)
    for dtype in (torch.bfloat16, torch.float16):
        half, prompt = copy.deepcopy(model).to(dtype), inputs.to(dtype)
        report = verify(half, prompt, 5)
        assert report.holds
        assert report.tested > 0.9
        assert report.max_error > torch.finfo(dtype).eps / 10  # no smaller than rounding
        with wrong_by(0.5, monkeypatch):
            assert not verify(half, prompt, 5).holds


def test_half_precision_does_not_overflow_into_agreement(monkeypatch):
    model, inputs = lively(dim=64, norm="none", blocks=1).half(), 1.2e4 * torch.randn(2, 6, 64).half()
    with wrong_by(-1.0, monkeypatch):
        assert not verify(model, inputs, 5).holds


@pytest.mark.parametrize("place", [0, 3, -1])
def test_what_is_not_a_number_does_not_hold(place):
    report = verify(lively(), torch.randn(6, 8).double(), 5)
    error = [list(block) for block in report.error]
    error[1][place] = math.nan
    broken = replace(report, error=error)
    assert (broken.holds, broken.max_error) == (False, math.inf)
    assert "the largest error is inf" in broken._repr_html_()
    assert broken.rows()[1]["at position"] == place % 6 + 1
    assert json.loads(broken.to_json())["error"][1][place] is None
    assert not replace(report, output_error=math.nan).holds


def test_a_model_whose_output_overflows_does_not_hold(monkeypatch):
    with wrong_by(3e38, monkeypatch):
        report = verify(lively(blocks=1).float(), torch.randn(6, 8), 5)
    assert not math.isfinite(report.max_error)
    assert not report.holds
    assert "FAILS" in str(report)


def test_a_check_that_tests_nothing_says_so():
    model = lively()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
    report = verify(model, torch.randn(6, 8).double(), 5, reference="self")
    assert report.holds
    assert report.tested == 0
    assert "Nothing was tested" in str(report)
    assert verify(lively(), torch.randn(6, 8).double(), 5).tested == 1


def test_mean_squared_difference():
    model, inputs = lively(blocks=2).float(), torch.randn(4, 6, 8)
    report = verify(model, inputs, 5)
    stream = inputs
    patch = absorb(model, inputs, 5)
    for index, (block, edits) in enumerate(zip(model.blocks, patch.blocks, strict=True)):
        with edits.applied(block, patch.anatomy):
            patched = block(stream[:, -1:])
        stream = block(stream)
        assert report.mean_squared_difference[index] == pytest.approx((patched - stream).square().mean().item())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tolerance": 0}, "tolerance is 0"),
        ({"tolerance": "tight"}, "tolerance is 'tight'"),
        ({"tolerance": True}, "tolerance is True"),
        ({"context_length": 0}, "context_length is 0"),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = {"model": lively(), "inputs": torch.randn(6, 8).double(), "context_length": 5, **change}
    with pytest.raises(ValueError, match=says):
        verify(**arguments)
