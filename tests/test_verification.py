"""The report: every block and position, each error beside its control, in every precision."""

import itertools
import json

import pytest
import torch
from test_absorb import lively

from icl_lib import Report, absorb, verification, verify

OPTIONS = list(itertools.product([False, True], ["none", "pre", "post"], [False, True], ["query", "self"]))


@pytest.mark.parametrize("width", [8, 64, 256])
@pytest.mark.parametrize(("skip", "norm", "causal", "reference"), OPTIONS)
def test_six_blocks_hold_to_rounding(width, skip, norm, causal, reference):
    model = lively(dim=width, blocks=6, skip=skip, norm=norm, causal=causal)
    inputs = torch.randn(2, 9, width).double()
    report = verify(model, inputs, 8, reference)
    assert report.tolerance == 1e-12
    assert report.holds, report
    # Without its edit every position is off, but for a causal model's first token by itself: it has no context. Without
    # skips, attention makes all tokens alike after a few blocks, and there is little left to get wrong.
    start = 1 if causal and reference == "self" else 0
    assert min(value for block in report.control[: 6 if skip else 1] for value in block[start:]) > 1e-6
    assert report.output_control > 1e-6
    single = verify(model.float(), inputs.float(), 8, reference)
    assert (single.tolerance, single.dtype) == (1e-5, "float32")
    assert single.holds, single


def test_errors_are_those_of_a_merged_copy():
    """The errors come from low-rank factors; a copy with edited weights, run on its own, must agree with them."""
    model, inputs = lively(blocks=3), torch.randn(2, 6, 8).double()
    report = verify(model, inputs, 5)
    patch = absorb(model, inputs, 5)
    answer = patch.merged(model)(inputs[:, 5:])
    wanted = model(inputs)[:, 5:]
    assert ((answer - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max() < 1e-12
    bare = model(inputs[:, 5:])
    control = ((bare - wanted).norm(dim=-1) / wanted.norm(dim=-1)).min().item()
    assert report.output_control == pytest.approx(control, rel=1e-12)


def test_a_wrong_edit_is_reported(monkeypatch):
    """The check can fail: with an epsilon in the denominator, or the sign reversed, it does."""
    model, inputs = lively(), torch.randn(2, 6, 8).double()
    right = verification.block_patch

    def scaled(factor):
        def wrong(reading, anatomy):
            edits = right(reading, anatomy)
            return type(edits)({path: factor * update for path, update in edits.inner.items()}, edits.outer)

        return wrong

    for factor in (1 + 1e-8, 0.0, -1.0):
        monkeypatch.setattr(verification, "block_patch", scaled(factor))
        report = verify(model, inputs, 5)
        assert not report.holds
        assert report.max_error > 1e-10
    monkeypatch.setattr(verification, "block_patch", right)
    assert verify(model, inputs, 5).holds


def test_the_report_prints_and_travels():
    report = verify(lively(), torch.randn(2, 6, 8).double(), 5)
    text = str(report)
    assert "Transformer, 3 blocks, 6 positions, 2 prompts, float64 on cpu, reference: query" in text
    assert "The identity holds to 1e-12" in text
    assert len([line for line in text.splitlines() if line.lstrip()[:1] in "123"]) >= 3
    assert report._repr_html_().startswith('<div class="icl-report">')
    assert report._repr_html_().count("<tr>") == 4
    data = json.loads(report.to_json())
    assert data == report.to_dict()
    assert data["holds"] is True
    assert [len(block) for block in data["error"]] == [6] * 3
    fields = {name: value for name, value in data.items() if name not in ("max_error", "holds")}
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


def test_half_precision():
    model, inputs = lively(), torch.randn(2, 6, 8)
    report = verify(model.bfloat16(), inputs.bfloat16(), 5)
    assert report.holds
    assert report.max_error > 1e-4  # eight bits of mantissa: it cannot be better


def test_mean_squared_difference():
    model, inputs = lively(blocks=2).float(), torch.randn(4, 6, 8)
    report = verify(model, inputs, 5)
    stream = inputs
    for index, (block, edits) in enumerate(zip(model.blocks, absorb(model, inputs, 5).blocks, strict=True)):
        with edits.applied(block, absorb(model, inputs, 5).anatomy):
            patched = block(stream[:, -1:])
        stream = block(stream)
        assert report.mean_squared_difference[index] == pytest.approx((patched - stream).square().mean().item())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tolerance": 0}, "tolerance is 0"),
        ({"tolerance": "tight"}, "tolerance is 'tight'"),
        ({"context_length": 0}, "context_length is 0"),
    ],
)
def test_bad_arguments_are_named(change, says):
    arguments = {"model": lively(), "inputs": torch.randn(6, 8).double(), "context_length": 5, **change}
    with pytest.raises(ValueError, match=says):
        verify(**arguments)
