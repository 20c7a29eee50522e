"""The derivations for a residual block at every position: each proves its result, refuses others, and computes it."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import sympy as sp
import torch
from test_symbolic import BACKENDS, assert_close, computed, draw
from test_symbolic import TestMarkdown as TestMarkdown  # the same tests, on the derivations of this file
from torch import nn

from icl_lib.symbolic import (
    alignment_across,
    alignment_within,
    bias_update,
    hidden_permutation,
    layer_norm,
    position_bias_update,
    position_weight_update,
    shared_factor,
    weight_update,
)
from icl_lib.symbolic.notation import put
from icl_lib.symbolic.residual_block import ACTIVATION, residual_block

BOTH = [position_weight_update, position_bias_update]
NORMS = ["symbol", "written out"]
SIZES = [(3, 2), (4, 3), (1, 3), (1, 1)]
CASES = {
    **{
        f"{derive.__name__}-{out}x{in_}": (derive, (out, in_))
        for derive in [*BOTH, alignment_within, alignment_across]
        for out, in_ in SIZES
    },
    **{
        f"{derive.__name__}-written-out-{out}x{in_}": (derive, (out, in_, "written out"))
        for derive in BOTH
        for out, in_ in [(3, 2), (2, 3)]
    },
    **{f"layer_norm-{dim}": (layer_norm, (dim,)) for dim in (1, 2, 5)},
    **{f"shared_factor-{sizes}": (shared_factor, sizes) for sizes in [(3, 2, 3), (1, 3, 2), (3, 1, 2), (2, 2, 1)]},
    **{f"hidden_permutation-{out}x{in_}": (hidden_permutation, (out, in_)) for out, in_ in [(3, 2), (2, 1), (4, 3)]},
}
EPS = 1e-5


@pytest.fixture(params=CASES)
def derivation(request):
    derive, arguments = CASES[request.param]
    return derive(*arguments)


def cosine(left, right):
    return (left * right).sum() / (np.linalg.norm(left) * np.linalg.norm(right))


class Block(nn.Module):
    """A pre-LN residual block on tokens ``[length, dim]``, in float64, with causal attention and random norms."""

    def __init__(self, seed, dim=3, hidden=4, causal=True):
        super().__init__()
        torch.manual_seed(seed)
        self.causal = causal
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for _ in range(2))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.double().requires_grad_(False)

    def attended(self, tokens):
        q, k, v = self.qkv(self.norms[0](tokens))[None].chunk(3, dim=-1)
        return self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[0])

    def forward(self, tokens):
        stream = tokens + self.attended(tokens)
        return stream + self.outer(nn.functional.gelu(self.inner(self.norms[1](stream))))


class TestProof:
    def test_result_passes(self, derivation):
        assert derivation.check()

    @pytest.mark.parametrize("factor", [2, -1, 0, sp.Rational(1001, 1000)], ids=str)
    def test_multiple_of_the_result_fails(self, derivation, factor):
        assert not replace(derivation, result=factor * derivation.result).check()

    @pytest.mark.parametrize("norm", NORMS)
    def test_the_query_and_the_context_exchanged_fails(self, norm):
        weight, bias = (derive(3, 2, norm) for derive in BOTH)
        x, alone, stream, attended = bias.arguments.values()
        exchanged = [(x, stream), (alone, attended), (stream, x), (attended, alone)]
        assert not replace(bias, result=put(bias.result, *exchanged)).check()
        if norm == "symbol":
            _, f, g = weight.arguments.values()
            exchanged = [(f, g), (g, f)]
        assert not replace(weight, result=put(weight.result, *exchanged)).check()

    @pytest.mark.parametrize("norm", NORMS)
    def test_bias_update_without_the_other_token_fails(self, norm):
        derivation = position_bias_update(3, 2, norm)
        _, alone, _, attended = derivation.arguments.values()
        assert not replace(derivation, result=attended - alone).check()

    @pytest.mark.parametrize("norm", NORMS)
    def test_weight_update_that_skips_the_norm_fails(self, norm):
        derivation, block, least = position_weight_update(3, 2, norm), residual_block(3, 2, norm), weight_update(3, 2)
        _, a0, aC = least.arguments.values()
        sums = (a0, block.alone + block.query), (aC, block.attended + block.stream)
        assert not replace(derivation, result=put(least.result, *sums)).check()
        assert replace(derivation, result=block.as_read(least.result)).check()

    def test_edit_with_the_effect_that_is_not_the_smallest_fails(self):
        derivation = position_weight_update(3, 2)
        W, f, _ = derivation.arguments.values()
        M = sp.ImmutableMatrix(3, 2, range(6))
        another = derivation.result + M * (sp.eye(2) - f * f.T / (f.T * f)[0])
        assert not replace(derivation, result=another).check()
        residuals = derivation.must_vanish(another)
        assert residuals["effect of the block"].applyfunc(sp.cancel).is_zero_matrix
        assert not residuals["stationarity"].applyfunc(sp.cancel).is_zero_matrix
        # An edit without the effect is told apart there.
        assert not derivation.must_vanish(W)["effect of the block"].applyfunc(sp.cancel).is_zero_matrix

    @pytest.mark.parametrize("norm", NORMS)
    def test_activation_does_not_cancel_without_the_weight_update(self, norm):
        block = residual_block(3, 2, norm)
        bias = position_bias_update(3, 2, norm)
        assert block.left_over(sp.zeros(3, 2), bias.result).has(ACTIVATION)
        assert not bias.step("What is left").expression.has(ACTIVATION)

    def test_the_norm_may_mix_all_entries(self):
        block = residual_block(3, 2, "symbol")
        for entry in block.read:
            assert set((*block.attended, *block.stream)) == entry.free_symbols
        # One entry of layer norm depends on all of them, too.
        assert set((*block.attended, *block.stream)) <= residual_block(3, 2, "written out").read[0].free_symbols

    def test_layer_norm_without_the_root_or_with_another_variance_fails(self):
        derivation = layer_norm(3)
        x, gain, shift, eps = derivation.arguments.values()
        centred = x - sp.ones(3, 1) * sum(x) / 3
        for divisor in (sum(c**2 for c in centred) / 3 + eps[0], sp.sqrt(sum(c**2 for c in centred) / 2 + eps[0])):
            wrong = gain.multiply_elementwise(centred) / divisor + shift
            assert not replace(derivation, result=wrong).check()

    def test_sum_that_leaves_out_a_position_fails(self):
        derivation = shared_factor(3, 2, 3)
        _, f, g = derivation.arguments.values()
        without_last = put(derivation.result, (g[2, :].T, f))
        assert not replace(derivation, result=without_last).check()
        assert not replace(derivation, result=derivation.result / 3).check()  # the mean is not the sum

    def test_cosine_of_what_is_read_fails(self):
        derivation = alignment_within(3, 2)
        _, f, g_i, g_j = derivation.arguments.values()
        left, right = g_i - f, g_j - f
        wrong = left.dot(right) / (sp.sqrt(left.dot(left)) * sp.sqrt(right.dot(right)))
        assert not replace(derivation, result=wrong).check()

    def test_cosine_across_blocks_without_the_right_factors_fails(self):
        derivation = alignment_across(3, 2)
        W, f, g, V, e, h = derivation.arguments.values()
        left, right = W * (g - f), V * (h - e)
        wrong = left.dot(right) / (sp.sqrt(left.dot(left)) * sp.sqrt(right.dot(right)))
        assert not replace(derivation, result=wrong).check()
        right_factors = f.dot(e) / (sp.sqrt(f.dot(f)) * sp.sqrt(e.dot(e)))
        assert replace(derivation, result=wrong * right_factors).check()


class TestSteps:
    @pytest.mark.parametrize("norm", NORMS)
    def test_the_block_asks_what_the_weight_update_answers(self, norm):
        derivation, block = position_weight_update(3, 2, norm), residual_block(3, 2, norm)
        W, effect = block.weight, derivation.step("For any activation").expression
        edit = sp.Matrix(3, 2, lambda i, j: sp.Symbol(rf"\Delta W_{{{i + 1},{j + 1}}}", real=True))
        expected = (W + edit) * block.read_alone - W * block.read
        assert (effect - expected).applyfunc(sp.expand).is_zero_matrix
        assert derivation.step("For any outer weights").expression.has(ACTIVATION)

    @pytest.mark.parametrize("norm", NORMS)
    def test_last_position_is_the_result_of_dherin_et_al(self, norm):
        derivation, skip = position_bias_update(3, 2, norm), bias_update(3, 2)
        x, alone, stream, attended = derivation.arguments.values()
        a0, aC = skip.arguments.values()
        expected = put(skip.result, (a0, alone), (aC, attended))
        assert derivation.step("At the last position").expression == expected
        assert put(derivation.result, (stream, x)) == expected
        assert derivation.result != expected

    @pytest.mark.parametrize("sizes", [(3, 2, 3), (2, 3, 4), (1, 3, 2), (3, 1, 2)])
    def test_every_minor_of_the_stack_is_zero(self, sizes):
        out, in_, positions = sizes
        minors = shared_factor(*sizes).step("Rank one").expression
        rows = out * positions
        assert len(minors) == rows * (rows - 1) // 2 * in_ * (in_ - 1) // 2
        assert all(minor == 0 for minor in minors)

    def test_variance_is_less_than_one(self):
        variance = layer_norm(3).step("Variance").expression
        x, _, _, eps = layer_norm(3).arguments.values()
        at = dict(zip(x, (0, 3, 6), strict=True))  # variance 6
        assert variance.subs(at | {eps[0]: 2}) == sp.Rational(3, 4)
        assert variance.subs(at | {eps[0]: 0}) == 1

    def test_exchanging_units_takes_the_alignment_from_one_to_zero(self):
        assert hidden_permutation(3, 2).step("From one to zero").expression == (1, 0)

    @pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (4, 3)])
    def test_change_across_blocks_is_not_zero_and_vanishes_for_equal_units(self, sizes):
        derivation = hidden_permutation(*sizes)
        change, W = derivation.result, derivation.arguments["W_l"]
        assert sp.cancel(change) != 0
        assert sp.cancel(put(change, (W[0, :], W[1, :]))) == 0


class TestNumbers:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dim", [2, 3, 7])
    def test_layer_norm_is_that_of_pytorch(self, dim, backend):
        for seed, eps in enumerate((0.0, EPS, 0.5)):
            x, gain, shift = draw(seed, dim, dim, dim)
            tensors = map(torch.from_numpy, (gain, shift))
            oracle = nn.functional.layer_norm(torch.from_numpy(x), (dim,), *tensors, eps=eps).numpy()
            assert_close(computed(layer_norm(dim), backend, x, gain, shift, eps), oracle)
            assert not np.allclose(computed(layer_norm(dim), backend, x, gain, shift, eps + 1), oracle)

    def test_layer_norm_of_a_constant_vector_is_the_shift(self):
        gain, shift = draw(0, 3, 3)
        assert_close(computed(layer_norm(3), "numpy", np.full(3, 7.0), gain, shift, EPS), shift)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("causal", [True, False], ids=["causal", "all-to-all"])
    def test_edited_block_answers_to_the_query_alone_as_at_every_position(self, causal, norm, backend):
        block, [tokens] = Block(seed=0, causal=causal), map(torch.from_numpy, draw(1, (5, 3)))
        query = tokens[-1:]
        answers, attended, attended_alone = block(tokens), block.attended(tokens), block.attended(query)
        inner_norm = block.norms[1]
        for i, answer in enumerate(answers):
            streams = [part.squeeze(0).numpy() for part in (query, attended_alone, tokens[i], attended[i])]
            if norm == "symbol":
                reads = [
                    inner_norm(part).squeeze(0).numpy() for part in (query + attended_alone, tokens[i] + attended[i])
                ]
            else:
                reads = [*streams, inner_norm.weight.numpy(), inner_norm.bias.numpy(), inner_norm.eps]
            weight, edited = block.inner.weight.numpy(), copy.deepcopy(block)
            weight_edit = computed(position_weight_update(4, 3, norm), backend, weight, *reads)
            bias_edit = computed(position_bias_update(4, 3, norm), backend, *streams)

            edited.outer.bias += torch.from_numpy(bias_edit)
            assert not torch.allclose(edited(query)[0], answer)  # the bias alone does not do it
            edited.inner.weight += torch.from_numpy(weight_edit)
            assert_close(edited(query)[0], answer)
            edited.outer.bias -= torch.from_numpy(bias_edit)
            assert not torch.allclose(edited(query)[0], answer)  # nor do the weights
            assert not torch.allclose(block(query)[0], answer)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_weight_update_is_the_least_norm_solution(self, backend):
        for seed in range(5):
            W, f, g = draw(seed, (4, 3), 3, 3)
            oracle = np.linalg.pinv(np.kron(np.eye(4), f)) @ (W @ (g - f))
            assert_close(computed(position_weight_update(4, 3), backend, W, f, g), oracle.reshape(4, 3))
            assert not np.allclose(computed(position_weight_update(4, 3), backend, W, g, f), oracle.reshape(4, 3))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_sum_of_the_updates_has_rank_one(self, backend):
        W, f, g = draw(3, (4, 3), 3, (5, 3))
        single, another = position_weight_update(4, 3).lambdify(), draw(4, 3)[0]
        stack = np.stack([single(W, f, g_i) for g_i in g])
        assert_close(computed(shared_factor(4, 3, 5), backend, W, f, g), stack.sum(0))
        assert np.linalg.matrix_rank(stack.reshape(-1, 3)) == np.linalg.matrix_rank(stack.sum(0)) == 1
        # One update with another right factor, and the rank is two.
        assert np.linalg.matrix_rank(stack.sum(0) + single(W, another, g[0])) == 2

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_alignment_is_the_cosine_of_the_matrices(self, backend):
        for seed in range(5):
            W, V, f, e, g, h = draw(seed, (4, 3), (4, 3), 3, 3, 3, 3)
            single = position_weight_update(4, 3).lambdify()
            within, across = alignment_within(4, 3), alignment_across(4, 3)
            assert_close(computed(within, backend, W, f, g, h), cosine(single(W, f, g), single(W, f, h)))
            oracle = cosine(single(W, f, g), single(V, e, h))
            assert_close(computed(across, backend, W, f, g, V, e, h), oracle)
            assert not np.allclose(cosine(W @ (g - f), V @ (h - e)), oracle)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_exchanging_units_changes_the_alignment_across_blocks_and_nothing_else(self, backend):
        W, V, f, e, g, h, k = draw(5, (4, 3), (4, 3), 3, 3, 3, 3, 3)
        order = [1, 0, 2, 3]
        block = Block(seed=2)
        permuted = copy.deepcopy(block)
        permuted.inner.weight[:] = block.inner.weight[order]
        tokens = torch.from_numpy(draw(6, (5, 3))[0])
        assert not torch.allclose(permuted(tokens), block(tokens))  # the rows alone are not the whole exchange
        permuted.inner.bias[:] = block.inner.bias[order]
        permuted.outer.weight[:] = block.outer.weight[:, order]
        assert_close(permuted(tokens), block(tokens))

        single = position_weight_update(4, 3).lambdify()
        before, other = single(W, f, g), single(V, e, h)
        after = single(W[order], f, g)
        change = computed(hidden_permutation(4, 3), backend, W, f, g, V, e, h)
        assert_close(change, (after * other).sum() - (before * other).sum())
        assert abs(cosine(after, other) - cosine(before, other)) > 1e-3
        within = alignment_within(4, 3)
        assert_close(computed(within, backend, W[order], f, g, k), computed(within, backend, W, f, g, k))


class TestErrors:
    @pytest.mark.parametrize("derive", BOTH)
    def test_unknown_norm(self, derive):
        with pytest.raises(ValueError, match="layer_norm='rms' is unknown: use 'symbol' or 'written out'"):
            derive(3, 2, layer_norm="rms")

    @pytest.mark.parametrize("derive", [*BOTH, alignment_within, alignment_across, hidden_permutation])
    @pytest.mark.parametrize("size", [0, -1, True])
    def test_bad_size(self, derive, size):
        with pytest.raises(ValueError, match=rf"out_features={size} .* whole number of at least 1"):
            derive(size, 2)
        with pytest.raises(ValueError, match=rf"in_features={size} .* whole number of at least 1"):
            derive(2, size)

    @pytest.mark.parametrize("size", [0, -1, True])
    def test_bad_count(self, size):
        with pytest.raises(ValueError, match=rf"dim={size} .* whole number of at least 1"):
            layer_norm(size)
        with pytest.raises(ValueError, match=rf"positions={size} .* whole number of at least 1"):
            shared_factor(3, 2, size)

    def test_one_hidden_unit_cannot_be_exchanged(self):
        with pytest.raises(ValueError, match="out_features=1 leaves no two hidden units to exchange: give at least 2"):
            hidden_permutation(1, 2)

    def test_array_of_another_shape(self):
        W, f, g = draw(0, (4, 3), 3, (2, 3))
        with pytest.raises(ValueError, match=r"g has shape \(2, 3\): give \[positions in\] = \(5, 3\)"):
            shared_factor(4, 3, 5).lambdify()(W, f, g)
