"""The tools of `make bench`: peak memory in bytes, counted operations, and a dense version of the verification."""

import pytest
import torch
from benchmarks.dense import dense_bytes, verify_dense
from benchmarks.memory import peak_memory
from benchmarks.operations import fitted_exponent, operations
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from icl_lib import Transformer, TransformerConfig, absorb, verify


def a_model(width=32, blocks=2, causal=True):
    config = TransformerConfig(dim=width, blocks=blocks, heads=4, hidden_layers=2, norm="pre", causal=causal)
    return Transformer(config).requires_grad_(False)


def test_peak_memory_by_hand():
    x, unit = torch.randn(100, 250), 100 * 250 * 4
    assert peak_memory(lambda: None) == 0
    assert peak_memory(lambda: x + x) == unit
    assert peak_memory(lambda: (x + x) * x) == 2 * unit
    assert peak_memory(lambda: x.mT @ x) == 250 * 250 * 4
    kept = [x + 1]
    assert peak_memory(kept.clear) == 0  # memory from before does not count, nor does its release

    def one_after_the_other():
        for _ in range(10):
            torch.exp(x)

    assert peak_memory(one_after_the_other) == unit


@pytest.mark.parametrize("blocks", [1, 3])
def test_peak_memory_of_a_forward_pass(blocks):
    """The peak is at the MLP's second layer.

    Then the block's input, the residual stream after attention, its norm and two layers of four times the width are in
    memory. The input of the first block does not count: it is the model's input, and existed before.
    """
    batch, tokens, width = 4, 64, 32
    model, inputs = a_model(width, blocks), torch.randn(batch, tokens, width)
    in_turn = 2 + 8 if blocks == 1 else 3 + 8
    assert peak_memory(lambda: model(inputs)) == in_turn * batch * tokens * width * 4


def test_dense_and_low_rank_agree():
    model, inputs = a_model().double(), torch.randn(3, 17, 32).double()
    report = verify(model, inputs, context_length=16)
    pairs = verify_dense(model, inputs)
    assert len(pairs) == len(report.error) == 2
    torch.testing.assert_close(pairs[-1][1], model(inputs), rtol=1e-12, atol=1e-12)
    patch = absorb(model, inputs, context_length=16)
    stream = inputs
    for block, edits, (patched, output) in zip(model.blocks, patch.blocks, pairs, strict=True):
        torch.testing.assert_close(patched, output, rtol=1e-12, atol=1e-12)
        with edits.applied(block, patch.anatomy):
            torch.testing.assert_close(patched, block(stream[:, -1:]), rtol=1e-12, atol=1e-12)
        assert (block(stream[:, -1:]) - output).norm() > 1e-2 * output.norm()  # negative control: without the edit
        stream = output
    assert report.holds


def test_the_dense_version_needs_little_more_than_its_matrices():
    batch, tokens, width = 2, 33, 64
    model, inputs = a_model(width), torch.randn(batch, tokens, width)
    matrices = dense_bytes(batch, tokens, width)
    assert matrices < peak_memory(lambda: verify_dense(model, inputs)) < 1.1 * matrices


def test_operations():
    batch, tokens, width, blocks = 2, 128, 32, 3
    model, inputs = a_model(width, blocks, causal=False), torch.randn(batch, tokens, width)
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch does not count the operations of its fused attention on the CPU
        with FlopCounterMode(display=False) as forward:
            model(inputs)
        with FlopCounterMode(display=False) as verification:
            verify(model, inputs, tokens - 1)
    count = operations(batch, tokens, width, blocks, causal=False)
    assert forward.get_total_flops() == count["forward"]
    # The formula may be off by a few reads of a single token.
    assert verification.get_total_flops() == pytest.approx(count["verify"], rel=0.02)
    causal = operations(batch, tokens, width, blocks)
    unseen = 2 * batch * blocks * 2 * width * tokens * (tokens - 1) // 2
    assert count["forward"] - causal["forward"] == unseen


def test_fitted_exponent():
    assert fitted_exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx((2, 0), abs=1e-12)
    # y = (0, 1, 0) over x = (0, 1, 2), in units of log 2: slope 0, residuals (-1, 2, -1) / 3, variance 2/3 over 1 · 2
    slope, error = fitted_exponent([1, 2, 4], [1, 2, 1])
    assert (slope, error) == pytest.approx((0, (1 / 3) ** 0.5), abs=1e-12)
