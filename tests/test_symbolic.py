"""The derivations: what they display is proved, their results agree with arrays, and a wrong formula fails."""

import ast
import dataclasses
import functools
import re
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sympy as sp
import torch
from derivations import numerically_true

import icl_lib
from icl_lib import constructions, dynamics, symbolic
from icl_lib.symbolic import weight_update
from icl_lib.symbolic.derivation import Asked, First, Given, Identity, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.layout import LINE, width
from icl_lib.symbolic.notation import latex, squared_norm

ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = [name for name in symbolic.__all__ if name[0].islower()]
DERIVATIONS = {
    **{name: getattr(symbolic, name) for name in STATEMENTS},
    **{f"weight_update {m} × {n}": lambda m=m, n=n: weight_update(m, n) for m, n in ((3, 2), (1, 1), (2, 1), (1, 3))},
    "normalised_lms_heads 3": lambda: symbolic.normalised_lms_heads(3),
}
SLOW = {"normalised_lms_heads 3"}
derivations = pytest.mark.parametrize(
    "derive",
    [
        pytest.param(functools.cache(derive), id=name, marks=[pytest.mark.slow] * (name in SLOW))
        for name, derive in DERIVATIONS.items()
    ],
)


# These divide by entries of a vector, by a matrix, or by the length of a multiple of the vector in the condition.
OTHER_CONDITIONS = {
    "joint_weight_update",
    "merged_time_course",
    "least_squares_edit",
    "one_layer_optimum",
    "scale_update",
    "static_update",
    "turning_update",
    "alignment",
}

# The transpose of these results is the same matrix.
SYMMETRIC = {"one_layer_optimum"}


def denominators(result):
    """What a result divides by."""
    powers = [part for part in sp.preorder_traversal(result) if isinstance(part, sp.Pow | sp.MatPow)]
    return {power.args[0] for power in powers if power.args[1].is_negative}


def displayed_as_nonzero(derivation):
    """The numbers, and the squared norms of the vectors, that a derivation displays as not zero."""
    conditions = [of for _, shown in derivation.displayed() if isinstance(shown, Nonzero) for of in shown.of]
    conditions += [derivation.meaning_of(of, derivation.names) for of in conditions]
    return {squared_norm(of) if of.is_Matrix else of for of in conditions}


def replaced(derivation, old, new):
    """The derivation with one displayed formula exchanged for another."""

    def exchange(steps):
        return {
            key: Step(step.text, *(new if shown is old else shown for shown in step.shows))
            for key, step in steps.items()
        }

    return dataclasses.replace(
        derivation,
        assumptions=exchange(derivation.assumptions),
        steps=exchange(derivation.steps),
        statement=new if derivation.statement is old else derivation.statement,
    )


def corrupted(equation):
    """The equation with something added to its last part."""
    *parts, last = equation.parts
    if isinstance(last, sp.MatrixBase):
        more = sp.ones(*last.shape)
    elif getattr(last, "is_Matrix", False):
        more = sp.MatrixSymbol("E", *last.shape)
    else:
        more = sp.Symbol("E")
    return type(equation)(*parts, last + more)


class TestEveryDerivation:
    @derivations
    def test_what_it_displays_is_proved(self, derive):
        derivation = derive()
        assert derivation.faults() == []
        assert derivation.check()

    @derivations
    def test_a_wrong_result_fails(self, derive):
        derivation = derive()
        wrong = [2 * derivation.result, 0 * derivation.result]
        if getattr(derivation.result, "is_Matrix", False):
            wrong += [derivation.result.T] * (derivation.name not in SYMMETRIC)
            added = sp.MatrixSymbol("E", *derivation.result.shape)
            is_explicit = isinstance(derivation.result, sp.MatrixBase)
            wrong.append(derivation.result + (sp.ones(*added.shape) if is_explicit else added))
        for candidate in wrong:
            if candidate != derivation.result:
                assert not dataclasses.replace(derivation, result=candidate).check(), candidate

    @derivations
    def test_a_wrong_display_fails_wherever_it_stands(self, derive):
        derivation = derive()
        equations = [shown for _, shown in derivation.displayed() if isinstance(shown, Identity | Asked | Given)]
        assert len(equations) >= 3
        for equation in equations:
            assert not replaced(derivation, equation, corrupted(equation)).check(), equation.rows
        for objective in (shown for _, shown in derivation.displayed() if isinstance(shown, Minimise)):
            assert not replaced(derivation, objective, Minimise(2 * objective.objective)).check(), objective.rows

    @pytest.mark.parametrize("name", [name for name in STATEMENTS if name not in OTHER_CONDITIONS])
    def test_what_its_result_divides_by_is_displayed_as_nonzero(self, name):
        """`check` does not prove the conditions, so they are compared with the denominators here."""
        derivation = DERIVATIONS[name]()
        assert denominators(derivation.result) <= displayed_as_nonzero(derivation)
        for condition in [shown for _, shown in derivation.displayed() if isinstance(shown, Nonzero)]:
            wrong = replaced(derivation, condition, Nonzero(sp.Symbol("E")))  # negative control
            assert not denominators(derivation.result) or not denominators(wrong.result) <= displayed_as_nonzero(wrong)

    @derivations
    def test_what_it_displays_holds_for_random_numbers(self, derive):
        """An oracle that knows no algebra: every identity is evaluated with random arrays."""
        derivation = derive()
        identities = [shown for _, shown in derivation.displayed() if isinstance(shown, Identity | Asked)]
        for equation in identities:
            assert numerically_true(derivation, equation), equation.rows
            assert not numerically_true(derivation, corrupted(equation)), equation.rows

    @derivations
    def test_every_formula_is_printed_from_its_expression(self, derive):
        derivation = derive()
        text = derivation._repr_markdown_()
        for key, shown in derivation.displayed():
            for row in shown.rows:
                assert row in text, key
                assert row.count("{") == row.count("}"), row
        for key, step in (*derivation.assumptions.items(), *derivation.steps.items()):
            assert set(vars(step)) == {"text", "shows"}
            assert derivation.step(key) is step
            assert re.match(r"\*\*[A-Z][^*]*[^*.]\.\*\* [A-Z$]", step.text), step.text  # a title, and a sentence

    @derivations
    def test_keys_are_unique_and_a_missing_one_is_named(self, derive):
        derivation = derive()
        keys = [*derivation.assumptions, *derivation.steps]
        assert len(keys) == len(set(keys))
        assert all(key.isidentifier() for key in keys)
        with pytest.raises(ValueError, match=r"key is 'no such step', but .* has no such step: choose from"):
            derivation.step("no such step")

    @derivations
    def test_a_result_that_depends_on_nothing_else(self, derive):
        derivation = derive()
        known = {
            s for given in derivation.arguments.values() for s in (given if isinstance(given, tuple) else (given,))
        }
        if derivation.entries is None:
            assert derivation.result.atoms(sp.MatrixSymbol) <= known
        else:
            assert derivation.result.free_symbols <= set().union(*(matrix.free_symbols for matrix in known))

    @derivations
    def test_the_prose_names_derivations_that_exist(self, derive):
        text = derive()._repr_markdown_()
        for name in re.findall(r"`(\w+)`", text):
            assert name in STATEMENTS, name


class TestPlantedFaults:
    """Faults that were once displayed without anything noticing."""

    def test_a_flipped_sign_in_the_weight_update(self):
        for derivation in (weight_update(), weight_update(3, 2)):
            left, right = derivation.statement.parts
            assert not dataclasses.replace(derivation, statement=Asked(left, -right)).check()

    def test_a_nonsense_loss(self):
        derivation = symbolic.normalised_lms()
        loss = derivation.step("loss").shows[0]
        nonsense = Identity(loss.parts[0], loss.parts[1] ** 3)
        assert not replaced(derivation, loss, nonsense).check()

    def test_pythagoras_with_a_minus(self):
        derivation = symbolic.uniqueness()
        name, right = derivation.statement.parts
        minus = Asked(name, right.args[0] - right.args[1])
        assert not dataclasses.replace(derivation, statement=minus).check()

    def test_a_bias_update_of_the_wrong_stream(self):
        derivation = symbolic.position_bias_update()
        name, right = derivation.statement.parts
        alone, stream = sorted(right.atoms(sp.MatrixSymbol), key=str)
        swapped = right.xreplace({alone: stream, stream: alone})
        assert not dataclasses.replace(derivation, statement=Asked(name, swapped)).check()

    def test_a_step_with_an_unrelated_matrix(self):
        derivation = symbolic.shared_factor()
        shown = derivation.step("shared_factor").shows[0]
        unrelated = Identity(shown.parts[0], sp.MatrixSymbol("Q", *shown.parts[0].shape))
        assert not replaced(derivation, shown, unrelated).check()

    def test_attention_of_a_single_token_times_three(self):
        derivation = symbolic.single_token_attention()
        assert dataclasses.replace(derivation, result=3 * derivation.result).faults()

    def test_a_normalised_lms_step_at_another_rate(self):
        derivation = symbolic.normalised_lms()
        alpha = derivation.arguments["alpha"]
        assert dataclasses.replace(derivation, result=derivation.result.xreplace({alpha: alpha / 2})).faults()

    def test_a_solution_that_is_not_the_least(self):
        least, every = weight_update(), symbolic.solution_set()
        assert dataclasses.replace(least, result=every.result).faults()
        assert dataclasses.replace(every, result=least.result).faults()  # one solution is not all

    def test_tidying_up_a_formula_proves_it(self):
        x = sp.MatrixSymbol("x", 2, 1)
        assert rewritten(x + x, 2 * x) == 2 * x
        with pytest.raises(ArithmeticError, match="was derived"):
            rewritten(x + x, 3 * x)


def columns(*shapes):
    rng = np.random.default_rng(7)
    return [rng.normal(size=shape) for shape in shapes]


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-13)
    scale = np.abs(expected).max()
    assert scale > 0
    with pytest.raises(AssertionError):  # the comparison can fail
        np.testing.assert_allclose(actual, np.asarray(expected) + 1e-3 * scale, rtol=1e-12, atol=1e-13)


class TestResults:
    """Every result, as a function of arrays, against an oracle that does not know the formula."""

    @pytest.mark.parametrize("out", range(1, 6))
    @pytest.mark.parametrize("in_", range(1, 6))
    def test_weight_update(self, out, in_):
        W, a_0, a_C = columns((out, in_), in_, in_)
        system = np.kron(np.eye(out), a_0)
        least = np.linalg.lstsq(system, W @ (a_C - a_0), rcond=None)[0].reshape(out, in_)
        arrays, tensors = (W, a_0, a_C), [torch.as_tensor(array) for array in (W, a_0, a_C)]
        for derivation in (weight_update(), weight_update(out, in_)):
            np.testing.assert_allclose(derivation.lambdify("numpy")(*arrays), least, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(derivation.lambdify("torch")(*tensors), least, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(icl_lib.weight_update(*tensors).dense(), least, atol=1e-12)

    def test_solution_set(self):
        W, a_0, a_C, M = columns((3, 4), 4, 4, (3, 4))
        X = symbolic.solution_set().lambdify()(W, a_0, a_C, M)
        close((W + X) @ a_0, W @ a_C)
        # The rows of X differ from the least-norm solution by the rows of M without their part along a_0.
        unit = a_0 / np.linalg.norm(a_0)
        close(X - weight_update().lambdify()(W, a_0, a_C), M - np.outer(M @ unit, unit))

    def test_uniqueness(self):
        W, a_0, a_C, M = columns((3, 4), 4, 4, (3, 4))
        X = symbolic.solution_set().lambdify()(W, a_0, a_C, M)
        close(symbolic.uniqueness().lambdify()(W, a_0, a_C, M), (X**2).sum())

    def test_bias_update(self):
        W, a_0, a_C, x, W_out = columns((5, 4), 4, 4, 4, (4, 5))
        edit, change = weight_update().lambdify()(W, a_0, a_C), symbolic.bias_update().lambdify()(a_0, a_C)
        prompted = x + a_C + W_out @ np.tanh(W @ a_C)
        close(x + a_0 + W_out @ np.tanh((W + edit) @ a_0) + change, prompted)

    def test_single_token_attention(self):
        W_O, W_V, x, scores = columns((4, 2), (2, 4), 4, 1)
        weights = np.exp(scores) / np.exp(scores).sum()
        close(symbolic.single_token_attention().lambdify()(W_O, W_V, x), (W_O @ W_V @ x[:, None] @ weights))

    def test_position_weight_update(self):
        W, f, g = columns((5, 4), 4, 4)
        edit = symbolic.position_weight_update().lambdify()(W, f, g)
        close((W + edit) @ f, W @ g)
        assert np.linalg.matrix_rank(edit) == 1

    def test_position_bias_update(self):
        x, A_0, c, A = columns(4, 4, 4, 4)
        close(symbolic.position_bias_update().lambdify()(x, A_0, c, A), (c + A) - (x + A_0))

    def test_shared_factor(self):
        W, f, g = columns((5, 4), 4, (3, 4))
        total = symbolic.shared_factor().lambdify()(W, f, g)
        close(total, sum(symbolic.position_weight_update().lambdify()(W, f, row) for row in g))
        assert np.linalg.matrix_rank(total) == 1

    def test_alignment(self):
        arrays = columns((5, 4), 4, 4, (5, 4), 4, 4)
        D, E = (weight_update().lambdify()(*arrays[k : k + 3]) for k in (0, 3))
        close(symbolic.alignment().lambdify()(*arrays), (D * E).sum() / np.linalg.norm(D) / np.linalg.norm(E))

    def test_hidden_permutation(self):
        arrays = columns((5, 4), 4, 4, (5, 4), 4, 4)
        P = np.eye(5)[[1, 2, 0, 3, 4]]
        D, E = (weight_update().lambdify()(*arrays[k : k + 3]) for k in (0, 3))
        close(symbolic.hidden_permutation().lambdify()(P, *arrays), (P @ D * E).sum() - (D * E).sum())

    def test_any_block(self):
        V_1, V_2, z_0, z_C, h_0, h_C = columns((5, 4), (5, 4), 4, 4, 3, 3)
        change = symbolic.any_block().lambdify()(h_0, h_C)
        gated = [
            (V_1 + weight_update().lambdify()(V_1, z_0, z_C)) @ z_0,
            (V_2 + weight_update().lambdify()(V_2, z_0, z_C)) @ z_0,
        ]
        close(h_0 + (np.tanh(gated[0]) * gated[1])[:3] + change, h_C + (np.tanh(V_1 @ z_C) * (V_2 @ z_C))[:3])

    def test_output_update(self):
        change, y = columns(5, 4)
        edit = symbolic.output_update().lambdify()(change, y)
        close(edit, np.linalg.lstsq(np.kron(np.eye(5), y), change, rcond=None)[0].reshape(5, 4))

    def test_scale_update(self):
        change, normed = columns(4, 4)
        close(symbolic.scale_update().lambdify()(change, normed), change / normed)

    def test_turning_update(self):
        wanted, read, scale = columns(4, 4, 4)
        turned = symbolic.turning_update().lambdify()(wanted, read, scale)
        stretch = np.linalg.norm(wanted / scale) / np.sqrt(4)  # an RMS norm returns vectors of this length
        close(stretch * scale * turned / np.sqrt((turned**2).mean()), wanted)
        close(np.linalg.norm(turned), np.linalg.norm(read))

    def test_joint_weight_update(self):
        V, Z_0, Z_C = columns((3, 6), (6, 2), (6, 2))
        edit = symbolic.joint_weight_update().lambdify()(V, Z_0, Z_C)
        close(edit, V @ (Z_C - Z_0) @ np.linalg.pinv(Z_0))
        ours = icl_lib.joint_weight_update(*map(torch.as_tensor, (V, Z_0.T, Z_C.T)))
        close(ours.dense(), edit)

    def test_expert_updates(self):
        change, hidden, gates, maps = columns(5, (3, 4), 3, (3, 5, 4))
        gates = np.abs(gates)
        edits = [symbolic.expert_updates().lambdify()(change, y, np.array(gates.sum())) for y in hidden]
        before = sum(p * W @ y for p, W, y in zip(gates, maps, hidden, strict=True))
        after = sum(p * (W + D) @ y for p, W, D, y in zip(gates, maps, edits, hidden, strict=True))
        close(after, before + change)

    def test_linear_losses(self):
        W, a_0, a_before, a_now = columns((5, 4), 4, 4, 4)
        step = symbolic.linear_losses().lambdify()(W, a_0, a_before, a_now)
        of = weight_update().lambdify()
        close(step, of(W, a_0, a_now) - of(W, a_0, a_before))
        # Autograd takes the gradient of the linear loss.
        U = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
        Delta = torch.as_tensor(np.outer(W @ (a_before - a_now), a_0))
        (slope,) = torch.autograd.grad((Delta * U).sum(), U)
        close(step, -slope.numpy() / (a_0 @ a_0))

    def test_running_average(self):
        scores, values = columns(6, (6, 4))
        weights = np.exp(scores) / np.exp(scores).sum()
        before = np.exp(scores[:-1]) @ values[:-1] / np.exp(scores[:-1]).sum()
        close(symbolic.running_average().lambdify()(weights[-1], before, values[-1]), weights @ values)

    def test_normalised_lms(self):
        W, a_0, a_before, v = columns((5, 4), 4, 4, 4)
        alpha, of = np.array(0.3), weight_update().lambdify()
        before = W + of(W, a_0, a_before)
        now = symbolic.normalised_lms().lambdify()(W, before, a_0, v, alpha)
        close(now, W + of(W, a_0, a_before + alpha * (v - a_before)))
        U = torch.as_tensor(before).requires_grad_()
        loss = (U @ torch.as_tensor(a_0) - torch.as_tensor(W @ v)).square().sum() / 2
        (slope,) = torch.autograd.grad(loss, U)
        close(now, before - alpha / (a_0 @ a_0) * slope.numpy())

    def test_normalised_lms_heads(self):
        W, a_0, a_before, v = columns((5, 4), 4, (3, 4), (3, 4))
        alpha, of = np.array([0.3, 0.1, 0.6]), weight_update().lambdify()
        before = W + of(W, a_0, a_before.sum(0))
        now = symbolic.normalised_lms_heads(3).lambdify()(W, before, a_0, a_before, v, alpha)
        read = (a_before + alpha[:, None] * (v - a_before)).sum(0)
        close(now, W + of(W, a_0, read))

    def test_one_layer_optimum(self):
        """The loss by Gauss–Hermite quadrature, and its minimum by Newton's method: no moment is typed."""
        rng, N = np.random.default_rng(0), 2
        half = rng.normal(size=(2, 2))
        nodes, weights = np.polynomial.hermite_e.hermegauss(3)  # exact for powers up to 5 of each coordinate
        grid = np.array(np.meshgrid(*[nodes] * 4)).reshape(4, -1).T.reshape(-1, N, 2) @ half.T
        mass = np.prod(np.meshgrid(*[weights / weights.sum()] * 4), axis=0).reshape(-1)
        sample = np.einsum("bni,bnj->bij", grid, grid) / N

        def loss(A):
            missed = (np.eye(2) - sample @ A) @ half
            return mass @ np.square(missed).sum((1, 2))

        basis = np.eye(4).reshape(4, 2, 2)
        zero = loss(np.zeros((2, 2)))
        slope = np.array([loss(e) - loss(-e) for e in basis]) / 2
        curvature = np.array([[loss(e + f) - loss(e) - loss(f) + zero for f in basis] for e in basis])
        least = np.linalg.solve(curvature, -slope).reshape(2, 2)
        derived = symbolic.one_layer_optimum().lambdify()(half @ half.T, np.array(float(N)))
        np.testing.assert_allclose(derived, least, rtol=1e-11)

    def test_eaten_from_left(self):
        W, r = columns((5, 4), (4, 4))
        P, step = W, symbolic.eaten_from_left().lambdify()
        for before, now in pairwise(r):
            P = step(P, before, now)
            close(P @ now, W @ r[0])
        assert np.linalg.matrix_rank(P - W) == 3


class TestCompiled:
    def test_pytorch_keeps_dtype_and_gradients(self):
        W = torch.eye(2, dtype=torch.float32, requires_grad=True)
        for derivation in (weight_update(), weight_update(2, 2)):
            update = derivation.lambdify("torch")(W, torch.ones(2), torch.tensor([3.0, 1.0]))
            assert update.dtype == torch.float32
            assert torch.autograd.grad(update.sum(), W)[0].abs().sum() > 0

    def test_bad_calls_are_named(self):
        with pytest.raises(ValueError, match="backend is 'jax', which is unknown: use 'numpy' or 'torch'"):
            weight_update().lambdify("jax")
        with pytest.raises(TypeError, match=r"weight_update takes W \[out in\], .*got 1 arrays"):
            weight_update().lambdify()(np.eye(2))
        with pytest.raises(ValueError, match=r"W has shape \(2, 2\): give \[out in\] = \(3, 2\)"):
            weight_update(3, 2).lambdify()(np.eye(2), np.ones(2), np.ones(2))

    @pytest.mark.parametrize(
        ("sizes", "name"), [((0, 2), "out_features"), ((2, True), "in_features"), ((2,), "in_features")]
    )
    def test_bad_sizes_are_named(self, sizes, name):
        with pytest.raises(ValueError, match=f"{name} is .*, which is not a size: give a whole number"):
            weight_update(*sizes)

    @pytest.mark.parametrize("heads", [0, -1, True])
    def test_a_bad_number_of_heads_is_named(self, heads):
        with pytest.raises(ValueError, match=r"heads is .*, which is not a size"):
            symbolic.normalised_lms_heads(heads)


def test_entries_are_derived_and_not_the_formula():
    """Nothing about the form of the edit is assumed: stationarity and the constraint are solved entry by entry."""
    derivation = weight_update(3, 2)
    assert len(derivation.entries) == 6
    assert any(isinstance(shown, First) for shown in derivation.step("outer_product").shows)


# Statements that no one function of the library computes, and where they are used instead.
NO_FUNCTION = {
    "solution_set": "a set of edits; `weight_update` computes its least member",
    "uniqueness": "a property of `weight_update`",
    "single_token_attention": "a property of `SoftmaxAttention`",
    "position_weight_update": "`absorb` computes it for all positions at once",
    "position_bias_update": "`absorb` computes it for all positions at once",
    "shared_factor": "a property of the patches that `absorb` returns",
    "hidden_permutation": "a property; `experiments.renumbered` renumbers the units",
    "any_block": "`absorb` applies it to every block of a language model",
    "expert_updates": "`absorb` applies `output_update` with the gates' sum",
    "normalised_lms_heads": "`dynamics.normalised_lms` computes any number of heads",
}


def function_of(name):
    """The function or class of the library that bears the statement's name, or the method of a trajectory."""
    words = "".join(word.capitalize() for word in name.split("_"))
    places = [
        getattr(icl_lib, name, None),
        getattr(dynamics, name, None),
        getattr(constructions, name, None),
        getattr(dynamics.Trajectory, name, None),
        getattr(__import__("icl_lib.blocks.running_average", fromlist=[words]), words, None),
    ]
    return next((place for place in places if place is not None), None)


@functools.cache
def names_of_tests():
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    return set(re.findall(r"^ *def (test_\w+)", "\n".join(texts), re.MULTILINE))


@pytest.mark.parametrize("name", STATEMENTS)
def test_one_name_in_derivation_function_test_and_book(name):
    assert (ROOT / "icl_lib" / "symbolic" / f"{name}.py").exists()
    assert getattr(symbolic, name)().name == name
    assert (function_of(name) is None) == (name in NO_FUNCTION), name
    assert f"test_{name}" in names_of_tests()
    label = name.replace("_", "-")
    pages = {path.name: path.read_text() for path in (ROOT / "book").glob("*.md")}
    stated = [page for page, text in pages.items() if f":label: {label}\n" in text or f"({label})=\n" in text]
    assert len(stated) == 1, f"{label} is the label of a statement on {stated or 'no page'}"
    assert f"symbolic.{name}(" in pages[stated[0]], f"{stated[0]} does not show the derivation of {label}"


# The equation of a derivation that the box in the book states, where it is not the derivation's own last line.
STATED_BY = {"linear_losses": ("rate", 2), "normalised_lms": ("target", 1), "normalised_lms_heads": ("target", 0)}
IN_WORDS = {"hidden_permutation"}


def plain(latex):
    """A formula without what only sets it: spaces, bold, the sizes of brackets, and superfluous braces."""
    latex = re.sub(r"\\[lr]Vert|\\\|", "|", latex)
    latex = re.sub(
        r"\\(?:boldsymbol|mathrm|bigl|bigr|Bigl|Bigr|left|right|quad|qquad|[,;!])(?![a-z])|\\\\(?:\[.*?\])?", "", latex
    )
    return re.sub(r"[\s{}&.]", "", latex)


@pytest.mark.parametrize("name", sorted(set(STATEMENTS) - IN_WORDS))
def test_the_box_in_the_book_states_what_is_derived(name):
    derivation, label = getattr(symbolic, name)(), name.replace("_", "-")
    key, which = STATED_BY.get(name, ("statement", 0))
    shown = derivation.statement if key == "statement" else derivation.step(key).shows[which]
    [page] = [text for path in (ROOT / "book").glob("*.md") if f":label: {label}\n" in (text := path.read_text())]
    box = plain(page.partition(f":label: {label}\n")[2].partition("\n:::\n")[0])
    formula = plain(latex(shown.parts[-1]))
    assert f"={formula}" in box
    assert f"=-{formula}" not in box
    assert f"={plain(latex(2 * shown.parts[-1]))}" not in box


def clear_caches():
    """Let every derivation be derived anew."""
    for module in [module for name, module in sys.modules.items() if name.startswith("icl_lib.symbolic.")]:
        for function in vars(module).values():
            if hasattr(function, "cache_clear"):
                function.cache_clear()


@pytest.mark.slow
def test_no_derivation_depends_on_the_text_of_a_step(monkeypatch):
    """Titles and sentences are edited, all of them, and then every statement is derived again."""

    def edited(self, text, *shows):
        self.text, self.shows = f"**Edited {len(text)}.** Every word is another one.", shows

    def shown(derivation):
        return [(key, formula.rows) for key, formula in derivation.displayed()]

    before = {name: derive() for name, derive in DERIVATIONS.items()}
    clear_caches()
    monkeypatch.setattr(Step, "__init__", edited)
    try:
        for name, derive in DERIVATIONS.items():
            derivation = derive()
            assert derivation is not before[name]
            assert all("Every word" in step.text for step in {**derivation.assumptions, **derivation.steps}.values())
            assert derivation.result == before[name].result
            assert shown(derivation) == shown(before[name])
            assert derivation.check()
    finally:
        clear_caches()


def test_no_display_is_typed():
    """Where a derivation shows a formula, it gives an expression: no step gets LaTeX."""
    for path in (ROOT / "icl_lib" / "symbolic").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Step":
                shows = node.args[1:]
                assert not any(isinstance(shown, ast.Constant | ast.JoinedStr) for shown in shows), path.name


@derivations
def test_every_formula_fits_a_phone(derive):
    for key, shown in derive().displayed():
        for row in shown.rows:
            assert width(row) <= 1.05 * LINE, (key, row)


def test_the_width_of_a_formula_is_estimated():
    assert width("W + W") > width("W W") > width("W")
    assert width(r"\frac{W W}{\boldsymbol{a}}") == pytest.approx(width("W W"), rel=0.2)
    assert width("W_{i+1}") < width("W i + 1")
    with pytest.raises(ValueError, match="has a brace that is not closed"):
        width("W_{i")
