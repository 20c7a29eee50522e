"""Every derivation proves its result and refuses any other, and computes what oracles without the formula do."""

from dataclasses import replace

import numpy as np
import pytest
import sympy as sp
import torch

from icl_lib.symbolic import (
    bias_update,
    single_token_attention,
    solution_set,
    uniqueness,
    weight_update,
    weight_update_any_size,
)
from icl_lib.symbolic.any_size import solve_affine
from icl_lib.symbolic.derivation import rewritten
from icl_lib.symbolic.notation import put, squared_norm

SIZES = [(3, 2), (4, 3), (3, 3), (1, 3), (3, 1), (1, 1)]
SIZED = [weight_update, solution_set, uniqueness, bias_update]
CASES = {
    **{f"{derive.__name__}-{out}x{in_}": (derive, (out, in_)) for derive in SIZED for out, in_ in SIZES},
    "weight_update_any_size": (weight_update_any_size, ()),
    "single_token_attention": (single_token_attention, ()),
}
BACKENDS = ["numpy", "torch"]


@pytest.fixture(params=CASES)
def derivation(request):
    derive, sizes = CASES[request.param]
    return derive(*sizes)


def draw(seed, *shapes):
    generator = np.random.default_rng(seed)
    return [generator.standard_normal(shape) for shape in shapes]


def computed(derivation, backend, *arrays):
    """Call the function that the derivation compiles to, and return a NumPy array."""
    function = derivation.lambdify(backend)
    arrays = [np.asarray(array) for array in arrays]
    return np.asarray(function(*map(torch.from_numpy, arrays) if backend == "torch" else arrays))


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)


class TestProof:
    def test_result_passes(self, derivation):
        assert derivation.check()

    @pytest.mark.parametrize("factor", [2, -1, 0, sp.Rational(1001, 1000)], ids=str)
    def test_multiple_of_the_result_fails(self, derivation, factor):
        assert not replace(derivation, result=factor * derivation.result).check()

    @pytest.mark.parametrize("entry", range(6))
    def test_weight_update_with_one_entry_changed_fails(self, entry):
        derivation = weight_update(3, 2)
        change = sp.ImmutableMatrix(3, 2, [int(k == entry) for k in range(6)])
        assert not replace(derivation, result=derivation.result + change).check()

    def test_weight_update_with_the_sides_exchanged_fails(self):
        derivation = weight_update(3, 3)
        assert not replace(derivation, result=derivation.result.T).check()

    def test_weight_update_of_another_shape_fails(self):
        derivation = weight_update(3, 2)
        assert not replace(derivation, result=derivation.result.T).check()
        assert not replace(derivation, result=derivation.result.reshape(2, 3)).check()

    def test_edit_with_the_effect_that_is_not_the_smallest_fails(self):
        derivation, every = weight_update(3, 2), solution_set(3, 2)
        another = put(every.result, (every.arguments["M"], every.arguments["W"]))
        residuals = derivation.must_vanish(another)
        assert residuals["effect"].applyfunc(sp.cancel).is_zero_matrix
        assert not replace(derivation, result=another).check()

    def test_weight_update_any_size_with_another_right_factor_fails(self):
        derivation = weight_update_any_size()
        W, a0, aC = derivation.arguments.values()
        for wrong in [
            W * (aC - a0) * aC.T / sp.Trace(aC.T * aC),
            W * (aC - a0) * a0.T,
            W * aC * a0.T / sp.Trace(a0.T * a0),
        ]:
            assert not replace(derivation, result=wrong).check()

    def test_solution_set_with_the_identity_for_the_projector_fails(self):
        derivation = solution_set(3, 2)
        unprojected = weight_update(3, 2).result + derivation.arguments["M"]
        assert not replace(derivation, result=unprojected).check()

    def test_solution_set_that_misses_solutions_fails(self):
        derivation = solution_set(3, 2)
        least = weight_update(3, 2).result
        assert not replace(derivation, result=least).check()
        M = derivation.arguments["M"]
        one_row_only = put(derivation.result, (M, sp.diag(1, 0, 0) * M))
        assert not replace(derivation, result=one_row_only).check()

    def test_uniqueness_without_the_second_square_fails(self):
        derivation = uniqueness(3, 2)
        assert not replace(derivation, result=squared_norm(weight_update(3, 2).result)).check()

    def test_bias_update_with_the_sign_flipped_fails(self):
        derivation = bias_update(3, 2)
        assert not replace(derivation, result=-derivation.result).check()

    def test_activation_does_not_cancel_without_the_weight_update(self):
        derivation = bias_update(3, 2)
        a0, aC = derivation.arguments.values()
        block = derivation.step("Block").expression
        assert (put(block, (aC, a0)) - block).has(sp.Function("g"))
        assert not derivation.step("What is left").expression.has(sp.Function("g"))

    def test_attention_without_the_output_map_fails(self):
        derivation = single_token_attention()
        _, W_V, x = derivation.arguments.values()
        assert not replace(derivation, result=W_V * x).check()

    def test_two_forms_that_differ_are_not_rewritten(self):
        a, b = sp.symbols("a b")
        assert rewritten((a + b) ** 2, a**2 + 2 * a * b + b**2) == a**2 + 2 * a * b + b**2
        with pytest.raises(ArithmeticError, match="something else"):
            rewritten((a + b) ** 2, a**2 + b**2)

    def test_only_affine_equations_are_solved(self):
        A, X = sp.MatrixSymbol("A", 2, 2), sp.MatrixSymbol("X", 2, 2)
        assert solve_affine(3 * X - A, X) == A / 3
        with pytest.raises(ArithmeticError, match="not a number times"):
            solve_affine(A * X - A, X)


class TestSteps:
    @pytest.mark.parametrize(("out", "in_"), SIZES)
    def test_rank_one_comes_out(self, out, in_):
        derivation = weight_update(out, in_)
        minors = derivation.step("Rank one").expression
        assert len(minors) == out * (out - 1) // 2 * in_ * (in_ - 1) // 2
        assert all(minor == 0 for minor in minors)
        assert derivation.step("Outer product").expression.rank() == 1

    def test_stationarity_is_the_derivative_of_the_lagrangian(self):
        derivation = weight_update(3, 2)
        lagrangian, gradient = (derivation.step(name).expression for name in ("Lagrangian", "Stationarity"))
        edit = sp.Matrix(3, 2, lambda i, j: sp.Symbol(rf"\Delta W_{{{i + 1},{j + 1}}}", real=True))
        h = sp.Symbol("h")
        for entry, derivative in zip(edit, gradient, strict=True):
            assert sp.limit((lagrangian.subs(entry, entry + h) - lagrangian) / h, h, 0).equals(derivative)

    def test_hessian_is_the_identity(self):
        assert weight_update(3, 2).step("Second order").expression == sp.eye(6)

    def test_numbers_of_equations_are_counted(self):
        whys = {step.name: step.why for step in weight_update(4, 3).steps}
        assert "first of 12 equations" in whys["Stationarity"]
        assert "all 18 of them" in whys["Rank one"]
        assert "first of 4 equations" in whys["What is left to satisfy"]
        assert "8 of the 12 entries" in solution_set(4, 3).step("Every solution").why

    @pytest.mark.parametrize("derive", [weight_update, solution_set, uniqueness])
    def test_the_input_must_not_be_zero(self, derive):
        assert isinstance(derive(3, 2).step("Something to read").expression, sp.Ne)

    def test_attention_weights_sum_to_one(self):
        weight = single_token_attention().step("Softmax").expression
        tokens, index = (next(s for s in weight.free_symbols if s.name == name) for name in ("n", "i"))
        of_three = weight.subs(tokens, 3).doit()
        assert sp.simplify(sum(of_three.subs(index, i) for i in (1, 2, 3))) == 1
        assert sp.simplify(of_three.subs(index, 1)) != 1  # one of several tokens does not get all the weight


class TestNumbers:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize(("out", "in_"), SIZES)
    @pytest.mark.parametrize("any_size", [False, True], ids=["entries", "wholes"])
    def test_weight_update_is_the_least_norm_solution(self, any_size, out, in_, backend):
        derivation = weight_update_any_size() if any_size else weight_update(out, in_)
        for seed in range(5):
            W, a0, aC = draw(seed, (out, in_), in_, in_)
            # The effect is linear in the entries of the edit; the pseudo-inverse gives its solution of least norm.
            oracle = np.linalg.pinv(np.kron(np.eye(out), a0)) @ (W @ (aC - a0))
            assert_close(computed(derivation, backend, W, a0, aC), oracle.reshape(out, in_))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_both_derivations_agree(self, backend):
        arrays = draw(0, (4, 3), 3, 3)
        entries, wholes = weight_update(4, 3), weight_update_any_size()
        assert_close(computed(entries, backend, *arrays), computed(wholes, backend, *arrays))
        W, a0, aC = arrays
        assert not np.allclose(computed(entries, backend, *arrays), computed(wholes, backend, W, aC, a0))

    def test_any_size_is_any_size(self):
        W, a0, aC = draw(0, (64, 48), 48, 48)
        update = computed(weight_update_any_size(), "numpy", W, a0, aC)
        assert_close((W + update) @ a0, W @ aC)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_every_other_solution_is_larger(self, backend):
        for seed in range(5):
            W, a0, aC, M = draw(seed, (4, 3), 3, 3, (4, 3))
            least = computed(weight_update(4, 3), backend, W, a0, aC)
            another = computed(solution_set(4, 3), backend, W, a0, aC, M)
            assert_close((W + another) @ a0, W @ aC)
            assert np.linalg.norm(another) > np.linalg.norm(least) + 1e-3
            squared = computed(uniqueness(4, 3), backend, W, a0, aC, M)
            assert_close(squared, (another**2).sum())

    def test_solution_set_reaches_any_solution(self):
        W, a0, aC, start = draw(1, (4, 3), 3, 3, (4, 3))
        # Gradient descent on the effect ends in the solution nearest to where it starts, and not in the least.
        solution = start.copy()
        for _ in range(200):
            solution -= np.outer((W + solution) @ a0 - W @ aC, a0) / (2 * a0 @ a0)
        M = solution - computed(weight_update(4, 3), "numpy", W, a0, aC)
        assert_close(computed(solution_set(4, 3), "numpy", W, a0, aC, M), solution)
        assert np.abs(M).max() > 0.1

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("activation", [np.tanh, lambda z: np.maximum(z, 0), np.sin], ids=["tanh", "relu", "sin"])
    def test_bias_update_makes_the_block_forget_the_context(self, activation, backend):
        x, a0, aC, W, b, outer, outer_b = draw(2, 3, 3, 3, (4, 3), 4, (3, 4), 3)

        def block(a, weight, output_bias):
            return x + a + outer @ activation(weight @ a + b) + output_bias

        edited = W + computed(weight_update(4, 3), backend, W, a0, aC)
        bias = outer_b + computed(bias_update(4, 3), backend, a0, aC)
        assert_close(block(a0, edited, bias), block(aC, W, outer_b))
        assert not np.allclose(block(a0, W, bias), block(aC, W, outer_b))
        assert not np.allclose(block(a0, edited, outer_b), block(aC, W, outer_b))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_single_token_attention_is_that_of_pytorch(self, backend):
        W_O, W_V, W_Q, W_K, x = draw(3, (5, 2), (2, 5), (2, 5), (2, 5), 5)
        query, key, value = (torch.from_numpy(W @ x)[None] for W in (W_Q, W_K, W_V))
        oracle = W_O @ torch.nn.functional.scaled_dot_product_attention(query, key, value)[0].numpy()
        assert_close(computed(single_token_attention(), backend, W_O, W_V, x), oracle)

    def test_tensors_keep_dtype_and_gradient(self):
        W, a0, aC = (torch.from_numpy(array).float() for array in draw(0, (3, 2), 2, 2))
        for derivation in (weight_update(3, 2), weight_update_any_size()):
            update = derivation.lambdify("torch")(W.requires_grad_(), a0, aC)
            assert update.dtype == torch.float32
            (gradient,) = torch.autograd.grad(update.sum(), W)
            expected = ((aC - a0) * a0.sum() / (a0 @ a0)).expand(3, 2)
            torch.testing.assert_close(gradient, expected)


class TestMarkdown:
    def test_is_fit_for_a_page(self, derivation):
        text = derivation._repr_markdown_()
        assert derivation.source in text
        assert r"\bm" not in text
        # At the start of a line these would make a heading or a list, even between dollar signs.
        assert not any(line.startswith(("#", "-", "+", "=")) for line in text.splitlines())
        fences = [line for line in text.splitlines() if "$$" in line]
        assert set(fences) == {"$$"}
        assert len(fences) == 2 * (len(derivation.assumptions) + len(derivation.steps) + 1)
        assert text.replace("$$", "").count("$") % 2 == 0
        assert text.count("{") == text.count("}")

    def test_every_step_is_named_and_explained(self, derivation):
        text = derivation._repr_markdown_()
        for number, step in enumerate(derivation.steps, start=1):
            assert f"**{number}. {step.name}.** {step.why}" in text
        for step in (*derivation.assumptions, *derivation.steps):
            assert step.why[0].isupper()
            assert step.why.endswith(".")
            assert step.latex in text

    def test_displays_are_short(self, derivation):
        assert max(map(len, derivation._repr_markdown_().split("$$")[1::2])) < 300


class TestErrors:
    @pytest.mark.parametrize("derive", SIZED)
    @pytest.mark.parametrize("size", [0, -1, True])
    def test_bad_size(self, derive, size):
        with pytest.raises(ValueError, match=rf"out_features={size} .* whole number of at least 1"):
            derive(size, 2)
        with pytest.raises(ValueError, match=rf"in_features={size} .* whole number of at least 1"):
            derive(2, size)

    @pytest.mark.parametrize("size", [2.0, "3"])
    def test_size_that_is_no_whole_number(self, size):
        weight_update(2, 2)  # 2.0 == 2 must not find this in the cache
        with pytest.raises((ValueError, TypeError)):  # a TypeError when annotations are checked, as in these tests
            weight_update(size, 2)

    def test_unknown_backend(self, derivation):
        with pytest.raises(ValueError, match="backend='jax' is unknown: use 'numpy' or 'torch'"):
            derivation.lambdify("jax")

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_array_of_another_shape(self, backend):
        W, a0, aC = draw(0, (2, 3), 2, 2)
        with pytest.raises(ValueError, match=r"W has shape \(2, 3\): give \[out in\] = \(3, 2\)"):
            computed(weight_update(3, 2), backend, W, a0, aC)

    def test_too_few_arrays(self, derivation):
        with pytest.raises(TypeError, match=f"{derivation.name} takes"):
            derivation.lambdify()(np.ones(2))

    def test_unknown_step(self):
        with pytest.raises(ValueError, match="choose from Effect, Smallest edit"):
            weight_update(3, 2).step("Magic")
