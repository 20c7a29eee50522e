"""The derivations of a prompt read token by token: each proves its result, refuses others, and computes it."""

import copy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import sympy as sp
import torch
from test_symbolic import BACKENDS, assert_close, draw
from test_symbolic import TestMarkdown as TestMarkdown  # the same tests, on the derivations of this file
from torch import nn

from icl_lib import ContextualBlock, LinearAttention, MeanPooling, SoftmaxAttention
from icl_lib.symbolic import (
    average_recursion,
    eaten_from_left,
    eating_step,
    gradient_step,
    normalised_lms,
    normalised_lms_heads,
    softmax_recursion,
    telescoping,
    weight_update,
    weight_update_any_size,
)
from icl_lib.symbolic.notation import matrix, put
from icl_lib.symbolic.recursion import INDEX, SCORES, TOKEN

SIZES = [(3, 2), (4, 3), (1, 3), (3, 1), (1, 1)]
EATEN = [(3, 2, 1), (3, 2, 2), (2, 2, 3), (1, 3, 2), (3, 1, 2), (1, 1, 1)]
PARTS = ["reads", "values", "alphas"]
HEADS = [(3, 2, 1), (3, 2, 2), (2, 2, 3), (1, 3, 2), (3, 1, 2)]
ANY_SIZE = [telescoping, eating_step, softmax_recursion, average_recursion]
CASES = {
    **{f"{derive.__name__}-{o}x{i}": (derive, (o, i)) for derive in [gradient_step, normalised_lms] for o, i in SIZES},
    **{f"eaten_from_left-{sizes}": (eaten_from_left, sizes) for sizes in EATEN},
    **{f"normalised_lms_heads-{sizes}": (normalised_lms_heads, sizes) for sizes in HEADS},
    **{derive.__name__: (derive, ()) for derive in ANY_SIZE},
}


@pytest.fixture(params=CASES)
def derivation(request):
    derive, arguments = CASES[request.param]
    return derive(*arguments)


def refuses(derivation, wrong):
    return not replace(derivation, result=wrong).check()


def zero(residual):
    return residual.applyfunc(sp.cancel).is_zero_matrix


def projector(a):
    """What sends a to zero and leaves alone what is perpendicular to it."""
    return sp.eye(len(a)) - a * a.T / a.dot(a)


def least_edit(W, a0, aC):
    """The weight update of the theorem, without its formula: the pseudo-inverse solves the effect with least norm."""
    edit = np.linalg.pinv(np.kron(np.eye(len(W)), a0)) @ (W @ (aC - a0))
    return edit.reshape(W.shape)


def compiled(derivation, backend):
    """The function that a derivation compiles to, from arrays to arrays."""
    function, convert = derivation.lambdify(backend), torch.from_numpy if backend == "torch" else np.asarray
    return lambda *arrays: np.asarray(function(*(convert(np.asarray(array)) for array in arrays)))


def asks(a0, *targets, weights=(1.0,)):
    """The loss that wants the weights to send a_0 to the targets, each with a weight of its own."""
    a0, targets, weights = (torch.from_numpy(np.asarray(part)) for part in (a0, targets, weights))
    return lambda matrix: (weights * (matrix @ a0 - targets).square().sum(1)).sum() / 2


def linear(coefficients):
    coefficients = torch.from_numpy(coefficients)
    return lambda matrix: (coefficients * matrix).sum()


def descended(start, rate, loss):
    """One step of gradient descent, with the gradient from autograd."""
    matrix = torch.from_numpy(start).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(matrix), matrix)
    return (matrix - rate * gradient).detach().numpy()


class Head:
    """A head of softmax attention over growing contexts: its reads from PyTorch, its values and its weight for each."""

    def __init__(self, seed, dim=3, tokens=6, head=2):
        W_Q, W_K, W_V, W_O, prompt, query = draw(
            seed, (head, dim), (head, dim), (head, dim), (dim, head), (tokens, dim), dim
        )
        sequence = np.vstack([query, prompt])  # the order of the keys does not matter
        self.values = sequence @ W_V.T @ W_O.T
        scores = sequence @ W_K.T @ W_Q @ query / np.sqrt(head)
        self.alphas = np.array([np.exp(scores[i]) / np.exp(scores[: i + 1]).sum() for i in range(tokens + 1)])
        q, k = (torch.from_numpy(part) for part in (query[None] @ W_Q.T, sequence @ W_K.T))
        v = torch.from_numpy(self.values)
        attend = nn.functional.scaled_dot_product_attention
        self.reads = np.stack([attend(q, k[: i + 1], v[: i + 1])[0].numpy() for i in range(tokens + 1)])


class TestProof:
    def test_result_passes(self, derivation):
        assert derivation.check()

    @pytest.mark.parametrize("factor", [2, -1, 0, sp.Rational(1001, 1000)], ids=str)
    def test_multiple_of_the_result_fails(self, derivation, factor):
        assert refuses(derivation, factor * derivation.result)

    def test_gradient_step_with_another_vector_fails(self):
        derivation = gradient_step(3, 2)
        W, a0, now, after = derivation.arguments.values()
        assert refuses(derivation, put(derivation.result, (now, after), (after, now)))
        assert refuses(derivation, put(derivation.result, (a0, now)))
        assert refuses(derivation, put(derivation.result, (now, a0)))  # the whole update, not the step
        assert refuses(derivation, W * (after - now) * a0.T)

    def test_gradient_step_that_is_not_the_smallest_fails(self):
        derivation = gradient_step(3, 2)
        W, a0, *_ = derivation.arguments.values()
        another = derivation.result + W * projector(a0)
        assert zero(derivation.must_vanish(another)["effect"])
        assert not zero(derivation.must_vanish(another)["step"])
        assert refuses(derivation, another)

    def test_sum_that_misses_the_start_or_has_another_factor_fails(self):
        derivation = telescoping()
        W, a0, last = derivation.arguments.values()
        square = sp.Trace(a0.T * a0)
        assert refuses(derivation, W * last * a0.T / square)
        assert refuses(derivation, W * (last - a0) * last.T / square)
        assert refuses(derivation, W * (last - a0) * a0.T)
        residuals = derivation.must_vanish(W * last * a0.T / square)  # right up to a constant
        assert residuals["one token more"].expand().doit().is_ZeroMatrix
        assert not residuals["no token"].expand().doit().is_ZeroMatrix

    def test_eating_from_the_weights_of_the_start_fails(self):
        derivation = eating_step()
        P, now, after = derivation.arguments.values()
        W = weight_update_any_size().arguments["W"]
        square = sp.Trace(after.T * after)
        assert refuses(derivation, P + W * (now - after) * after.T / square)
        assert refuses(derivation, P + P * (now - after) * now.T / sp.Trace(now.T * now))
        assert refuses(derivation, P + P * (now - after) * after.T)
        assert refuses(derivation, P)

    def test_one_edit_for_the_whole_context_answers_the_same_and_is_another(self):
        derivation, least = eaten_from_left(3, 2, 2), weight_update(3, 2)
        (W, a0, aC), s = least.arguments.values(), derivation.arguments["s"]
        at_once = W + put(least.result, (a0, s.row(2).T), (aC, s.row(0).T))
        residuals = derivation.must_vanish(at_once)
        assert zero(residuals["answer"])
        assert not zero(residuals["stationarity of the last edit"])
        assert refuses(derivation, at_once)
        single = eaten_from_left(3, 2, 1)
        s = single.arguments["s"]
        assert replace(single, result=W + put(least.result, (a0, s.row(1).T), (aC, s.row(0).T))).check()

    def test_tokens_eaten_in_another_order_fail(self):
        derivation = eaten_from_left(2, 2, 3)
        s = derivation.arguments["s"]
        assert refuses(derivation, put(derivation.result, (s.row(1), s.row(2)), (s.row(2), s.row(1))))

    def test_recursion_with_another_rate_or_another_value_fails(self):
        softmax, average = softmax_recursion(), average_recursion()
        alpha, a, v = softmax.arguments.values()
        assert refuses(softmax, v + alpha * (a - v))
        assert refuses(softmax, a + alpha * v)
        assert refuses(softmax, a + alpha**2 * (v - a))
        i, score, a, v = average.arguments.values()
        assert refuses(average, a + (score * v - a) / i)
        assert refuses(average, a + (v - a) / (i + 1))
        assert refuses(average, a + score * (v - a) / (i + 1))

    def test_lms_with_another_rate_or_target_fails(self):
        derivation = normalised_lms(3, 2)
        W, before, a0, v, alpha = derivation.arguments.values()
        square, rate = a0.dot(a0), alpha[0]
        for wrong in [
            before - rate * (before * a0 - W * v) * a0.T,  # LMS that is not normalised
            before - (before * a0 - W * v) * a0.T / square,  # all the way
            before - rate * (before * a0 - W * a0) * a0.T / square,
            before - rate * (W * a0 - W * v) * a0.T / square,  # the gradient at the weights of the start
            before - rate * (before * a0 - W * v) * v.T / square,
        ]:
            assert refuses(derivation, wrong)

    def test_step_that_is_right_on_the_path_only_fails(self):
        derivation = normalised_lms(3, 2)
        W, before, a0, *_ = derivation.arguments.values()
        # On the path, the weights differ from W by a multiple of a_0ᵀ, which the projector removes.
        another = derivation.result + (before - W) * projector(a0)
        residuals = derivation.must_vanish(another)
        assert zero(residuals["step"])
        assert not zero(residuals["gradient descent"])
        assert refuses(derivation, another)

    def test_heads_with_a_common_rate_or_the_targets_of_a_single_head_fail(self):
        derivation = normalised_lms_heads(3, 2, 2)
        W, before, a0, _, v, alpha = derivation.arguments.values()
        assert refuses(derivation, put(derivation.result, (alpha, sp.ones(2, 1) * alpha[0])))
        alone = before
        for h in range(2):
            alone -= alpha[h] * (before * a0 - W * v.row(h).T) * a0.T / a0.dot(a0)
        assert refuses(derivation, alone)

    def test_heads_exchanged_fail_unless_all_of_each_is(self):
        derivation = normalised_lms_heads(3, 2, 2)
        *_, reads, values, alpha = derivation.arguments.values()
        exchanged = [(rows, rows.elementary_row_op("n<->m", row1=0, row2=1)) for rows in (reads, values, alpha)]
        assert refuses(derivation, put(derivation.result, *exchanged[:2]))
        assert replace(derivation, result=put(derivation.result, *exchanged)).check()


class TestSteps:
    def test_any_two_matrices_have_such_a_loss(self):
        gradient = gradient_step(3, 2).step("Any two matrices").expression
        h, first, second = sp.Symbol(r"\eta", positive=True), matrix("M^{i}", 3, 2), matrix("M^{i+1}", 3, 2)
        assert gradient.free_symbols == {h, *first, *second}
        assert zero(first - h * gradient - second)

    def test_only_the_rate_times_the_loss_is_determined(self):
        derivation = gradient_step(3, 2)
        asked, found = (derivation.step(name).expression for name in ("Its coefficients", "Rate"))
        h = sp.Symbol(r"\eta", positive=True)
        assert zero(asked * h + derivation.result)
        assert h not in found.free_symbols

    def test_the_sum_is_what_adding_up_gives(self):
        derivation = telescoping()
        added, total = (
            derivation.step(name).expression for name in ("The order of the sums", "The sum over the tokens")
        )
        names = {symbol.name: symbol for symbol in added.free_symbols}
        for tokens in (1, 2, 5):
            size = {names["n"]: tokens, names["d"]: 2}
            written_out = added.subs(size).doit()
            assert sp.expand(sp.numer(sp.together(written_out - total.subs(size).doit()))) == 0
            assert sp.expand(written_out) != 0

    @pytest.mark.parametrize("sizes", EATEN)
    def test_each_token_keeps_the_answer_and_adds_at_most_one_rank(self, sizes):
        *_, tokens = sizes
        derivation = eaten_from_left(*sizes)
        W, s = derivation.arguments.values()
        for i in range(1, tokens + 1):
            assert derivation.step(f"Token {i}").expression == W * s.row(0).T
        assert all(minor == 0 for minor in derivation.step("Rank one a token").expression)
        whole = derivation.step("Rank of the whole").expression
        numbers = {symbol: value for symbol, value in zip((*W, *s), sp.primerange(100), strict=False)}
        assert whole.xreplace(numbers).rank() == min(sizes)

    def test_eating_goes_to_one_target(self):
        step = eating_step()
        kaczmarz = step.step("One target").expression
        P, now, _ = step.arguments.values()
        answer = step.step("Induction").expression
        assert kaczmarz.has(answer)
        assert not kaczmarz.has(now)
        assert kaczmarz.xreplace({answer: P * now}).expand().doit() == step.result.expand().doit()

    def test_sums_of_softmax_hold_for_numbers(self):
        derivation = softmax_recursion()
        weight, kept = (derivation.step(name).expression for name in ("Attention weights", "The others"))
        left, right = (form.subs({TOKEN: 4, INDEX: 2}).doit() for form in (weight, kept))
        assert left == sp.exp(SCORES[2]) / sum(sp.exp(SCORES[j]) for j in range(5))
        assert sp.cancel(left - right) == 0
        assert derivation.step("Uniform attention").expression == 1 / (TOKEN + 1)

    def test_target_and_rate_come_out(self):
        derivation = normalised_lms(3, 2)
        W, _, a0, v, alpha = derivation.arguments.values()
        asked = derivation.step("Target for a rate").expression
        _, rate = derivation.step("Rate").expression
        found, _ = derivation.step("Normalised LMS").expression
        assert sp.cancel(rate - alpha[0] / a0.dot(a0)) == 0
        assert found == W * v
        read = {symbol for symbol in asked.free_symbols if symbol.name.startswith("a_{i-1")}
        eta = next(symbol for symbol in asked.free_symbols if symbol.name == r"\eta")
        assert len(read) == 2
        # At twice the rate the target still depends on what was read before.
        assert sp.cancel(asked.xreplace({eta: 2 * rate})[0].diff(min(read, key=str))) != 0
        assert sp.cancel(asked.xreplace({eta: rate})[0].diff(min(read, key=str))) == 0

    def test_one_head_is_normalised_lms(self):
        single, heads = normalised_lms(3, 2), normalised_lms_heads(3, 2, 1)
        W, before, a0, _, values, alpha = heads.arguments.values()
        renamed = zip(single.arguments.values(), (W, before, a0, values.T, alpha), strict=True)
        assert zero(put(single.result, *renamed) - heads.result)

    def test_target_of_a_head_does_not_depend_on_its_own_read(self):
        derivation = normalised_lms_heads(3, 2, 3)
        reads = derivation.arguments["a_before"]
        for h, target in enumerate(derivation.step("Targets").expression):
            depends = [any(sp.expand(entry).has(*reads.row(g)) for entry in target) for g in range(3)]
            assert depends == [g != h for g in range(3)]


@pytest.mark.parametrize("backend", BACKENDS)
class TestNumbers:
    @pytest.mark.parametrize(("out", "in_"), SIZES)
    def test_gradient_step_is_a_step_between_the_updates(self, out, in_, backend):
        step = compiled(gradient_step(out, in_), backend)
        for seed in range(3):
            W, a0, now, after = draw(seed, (out, in_), in_, in_, in_)
            W_now, W_next = W + least_edit(W, a0, now), W + least_edit(W, a0, after)
            assert_close(W_now + step(W, a0, now, after), W_next)
            loss, rate = linear(np.outer(W @ (now - after), a0)), 1 / (a0 @ a0)
            assert_close(descended(W_now, rate, loss), W_next)
            assert not np.allclose(descended(W_now, 2 * rate, loss), W_next)

    @pytest.mark.parametrize(("sizes", "tokens"), [((4, 3), 1), ((4, 3), 7), ((48, 32), 20)])
    def test_steps_add_up(self, sizes, tokens, backend):
        W, reads = draw(tokens, sizes, (tokens + 1, sizes[1]))
        edits = [np.outer(W @ (a - reads[0]), reads[0]) / (reads[0] @ reads[0]) for a in reads]
        total = compiled(telescoping(), backend)(W, reads[0], reads[-1])
        assert_close(total, sum(np.diff(edits, axis=0)))
        assert not np.allclose(total, sum(np.diff(edits[:-1], axis=0)))

    @pytest.mark.parametrize("tokens", [1, 2, 3])
    def test_eaten_from_left_is_the_theorem_again_and_again(self, tokens, backend):
        all_at_once, step = compiled(eaten_from_left(4, 3, tokens), backend), compiled(eating_step(), backend)
        for seed in range(3):
            W, s = draw(seed, (4, 3), (tokens + 1, 3))
            P = W
            for now, after in pairwise(s):
                before, P = P, P + least_edit(P, after, now)
                assert_close(P @ after, W @ s[0])
                assert_close(step(before, now, after), P)
                assert_close(descended(before, 1 / (after @ after), asks(after, W @ s[0])), P)  # Kaczmarz
                assert np.linalg.matrix_rank(P - before) == 1
            assert_close(all_at_once(W, s), P)
            assert np.linalg.matrix_rank(P - W) == tokens
            assert np.allclose(P, W + least_edit(W, s[-1], s[0])) == (tokens == 1)

    def test_softmax_recursion_is_attention_over_growing_contexts(self, backend):
        recursion = compiled(softmax_recursion(), backend)
        for head in map(Head, range(3)):
            for i, (before, now) in enumerate(pairwise(head.reads), start=1):
                assert_close(recursion(head.alphas[i], before, head.values[i]), now)
                assert not np.allclose(recursion(1 / (i + 1), before, head.values[i]), now)

    @pytest.mark.parametrize("layer", [LinearAttention(dim=3), MeanPooling()], ids=["linear attention", "mean pooling"])
    def test_average_recursion_is_a_layer_over_growing_contexts(self, layer, backend):
        layer, recursion = copy.deepcopy(layer).double().requires_grad_(False), compiled(average_recursion(), backend)
        context, query = map(torch.from_numpy, draw(0, (6, 3), 3))
        scores, values = np.ones(6), context
        if layer.dim is not None:
            scores, values = layer.key(context) @ layer.query(query), layer.output(layer.value(context))
        reads = [layer(context[:i], query).numpy() for i in range(7)]
        for i, (before, now) in enumerate(pairwise(reads), start=1):
            token = scores[i - 1], before, values[i - 1]
            assert_close(recursion(float(i), *token), now)
            assert not np.allclose(recursion(i + 1.0, *token), now)

    @pytest.mark.parametrize("out", [1, 4])
    def test_attention_is_normalised_lms(self, out, backend):
        lms = compiled(normalised_lms(out, 3), backend)
        for seed in range(2):
            head, [W] = Head(seed), draw(100 + seed, (out, 3))
            a0, now = head.reads[0], W
            for i, (read, next_read) in enumerate(pairwise(head.reads), start=1):
                v, alpha = head.values[i], head.alphas[i]
                before, now = now, lms(W, now, a0, v, alpha)
                assert_close(now, W + least_edit(W, a0, next_read))
                assert_close(now, descended(before, alpha / (a0 @ a0), asks(a0, W @ v)))
                assert_close(now @ a0 - W @ v, (1 - alpha) * (before @ a0 - W @ v))
                assert_close(np.linalg.norm(now - before), alpha * np.linalg.norm(W @ (v - read)) / np.linalg.norm(a0))
                assert not np.allclose(lms(W, before, a0, v, alpha / 2), now)

    @pytest.mark.parametrize("heads", [1, 2, 3])
    def test_multi_head_attention_is_a_step_of_normalised_lms_a_head(self, heads, backend):
        lms, every = compiled(normalised_lms_heads(2, 3, heads), backend), [Head(seed) for seed in range(heads)]
        reads, values, alphas = (np.stack([getattr(head, part) for head in every], axis=1) for part in PARTS)
        a0, W = reads[0].sum(0), draw(9, (2, 3))[0]
        now = W
        for i in range(1, len(reads)):
            before, now = now, lms(W, now, a0, reads[i - 1], values[i], alphas[i])
            assert_close(now, W + least_edit(W, a0, reads[i].sum(0)))
            # Head h reads the token alone, and the others what they read before.
            alone = np.where(np.eye(heads, dtype=bool)[..., None], values[i], reads[i - 1])
            targets = alone.sum(1) @ W.T
            assert_close(now, descended(before, 1 / (a0 @ a0), asks(a0, *targets, weights=alphas[i])))
            same_rate = lms(W, before, a0, reads[i - 1], values[i], np.full(heads, alphas[i].mean()))
            assert np.allclose(same_rate, now) == (heads == 1)

    def test_weights_that_have_made_all_steps_replace_the_context(self, backend):
        layer, step = SoftmaxAttention(dim=3), compiled(normalised_lms(4, 3), backend)
        block = ContextualBlock(layer, nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)))
        block = block.double().requires_grad_(False)
        context, query = map(torch.from_numpy, draw(0, (5, 3), 3))
        a0, W = layer(context[:0], query).numpy(), block.first_linear.weight.numpy().copy()
        scores = ((layer.key(torch.vstack([query[None], context])) @ layer.query(query)) / np.sqrt(3)).numpy()
        values = layer.output(layer.value(context)).numpy()

        edited, weights = copy.deepcopy(block), W
        for i, v in enumerate(values, start=1):
            alpha = np.exp(scores[i]) / np.exp(scores[: i + 1]).sum()
            weights = step(W, weights, a0, v, alpha)
            edited.first_linear.weight[:] = torch.from_numpy(weights)
            assert_close(edited(context[:0], query), block(context[:i], query))
            assert not torch.allclose(block(context[:0], query), block(context[:i], query))


def test_tensors_keep_dtype_and_gradient():
    before, value = (torch.from_numpy(array).float() for array in draw(0, 3, 3))
    alpha = torch.tensor(0.25, requires_grad=True)
    now = softmax_recursion().lambdify("torch")(alpha, before, value)
    assert now.dtype == torch.float32
    (gradient,) = torch.autograd.grad(now.sum(), alpha)
    torch.testing.assert_close(gradient, (value - before).sum())


class TestErrors:
    @pytest.mark.parametrize("size", [0, -1, True])
    def test_bad_size(self, size):
        more = {gradient_step: (), normalised_lms: (), eaten_from_left: (2,), normalised_lms_heads: (2,)}
        for derive, counts in more.items():
            with pytest.raises(ValueError, match=rf"out_features={size} .* whole number of at least 1"):
                derive(size, 2, *counts)
            with pytest.raises(ValueError, match=rf"in_features={size} .* whole number of at least 1"):
                derive(2, size, *counts)

    @pytest.mark.parametrize("size", [0, -1, True])
    def test_bad_count(self, size):
        with pytest.raises(ValueError, match=rf"tokens={size} .* whole number of at least 1"):
            eaten_from_left(3, 2, size)
        with pytest.raises(ValueError, match=rf"heads={size} .* whole number of at least 1"):
            normalised_lms_heads(3, 2, size)

    def test_array_of_another_shape(self):
        W, s = draw(0, (3, 2), (4, 2))
        with pytest.raises(ValueError, match=r"s has shape \(4, 2\): give \[tokens\+1 in\] = \(3, 2\)"):
            eaten_from_left(3, 2, 2).lambdify()(W, s)
