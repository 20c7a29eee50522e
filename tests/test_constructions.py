"""Linear attention that is gradient descent by construction: against plain NumPy, with perturbed controls."""

import numpy as np
import pytest
import torch
from cases import normal, relative
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from icl_lib import (
    ContextualBlock,
    LinearAttention,
    LowRank,
    implicit_update,
    least_norm_edit,
    least_squares_edit,
    share_served,
    symbolic,
)
from icl_lib.constructions import (
    InterpolatedAttention,
    LinearSelfAttention,
    context_matrix,
    gradient_descent_attention,
    interpolated,
    merged,
    query_independent_update,
    regression_prompts,
    repeated,
    train_linear_attention,
)
from icl_lib.dynamics import normalised_lms, trajectory


def task(examples, features, outputs, seed=0):
    """Inputs ``[N, in]``, targets ``[N, out]``, start ``[out, in]``, a fresh input; the tokens and the query token."""
    x, y, start, fresh = normal((examples, features), (examples, outputs), (outputs, features), (features,), seed=seed)
    return x, y, start, fresh, torch.cat([x, y], dim=-1), torch.cat([fresh, -start @ fresh])


def descent(x, y, start, step_size, steps):
    """All weights of plain gradient descent on the mean squared error, in NumPy."""
    x, y, weights = x.numpy(), y.numpy(), [start.numpy()]
    for _ in range(steps):
        gradient = (weights[-1] @ x.T - y.T) @ x / len(x)
        weights.append(weights[-1] - step_size * gradient)
    return weights


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-12, atol=1e-12)


def perturbed(layer, name):
    """A copy of the layer with one of its matrices changed by a thousandth."""
    copy = LinearSelfAttention(layer.dim, layer.mean).double()
    copy.load_state_dict(layer.state_dict())
    with torch.no_grad():
        weight = getattr(copy, name).weight
        weight += 1e-3 * normal(weight.shape, seed=5)[0]
    return copy.requires_grad_(False)


class TestGradientDescent:
    @given(
        examples=st.integers(1, 12),
        features=st.integers(1, 6),
        outputs=st.integers(1, 4),
        step_size=st.floats(0.01, 0.5),
        seed=st.integers(0, 99),
    )
    def test_gradient_descent_attention(self, examples, features, outputs, step_size, seed):
        x, y, start, fresh, context, query = task(examples, features, outputs, seed)
        layer = gradient_descent_attention(start, step_size, examples).requires_grad_(False)
        after = descent(x, y, start, step_size, 1)[1]
        close(layer(context, query), np.concatenate([fresh, -after @ fresh.numpy()]))
        # Autograd takes the gradient of the loss as well.
        at = start.clone().requires_grad_()
        (slope,) = torch.autograd.grad((at @ x.T - y.T).square().sum() / (2 * examples), at)
        close(after, start - step_size * slope)
        # SymPy's formula, for every token of the context.
        derived = symbolic.gradient_descent_attention().lambdify()
        numbers = np.array(step_size), np.array(float(examples))
        for token, moved in zip(context, layer.update(context, context), strict=True):
            inputs, target = token.numpy()[:features], token.numpy()[features:]
            close(moved[features:], derived(start.numpy(), x.numpy().T, y.numpy().T, inputs, target, *numbers))
            close(moved[:features], inputs)

    @pytest.mark.parametrize("steps", [1, 2, 20])
    def test_layers_are_steps_on_every_token(self, steps):
        x, y, start, fresh, context, query = task(12, 4, 3)
        layer = gradient_descent_attention(start, 0.2, 12).requires_grad_(False)
        after = repeated(layer, context, query, steps)
        weights = descent(x, y, start, 0.2, steps)
        assert np.abs(weights[-1] - weights[0]).max() > 0.1
        for tokens, weight in zip(after, weights, strict=True):
            close(-tokens[-1, 4:], weight @ fresh.numpy())
            close(tokens[:-1, 4:], y.numpy() - x.numpy() @ (weight - weights[0]).T)  # residuals of every example
            close(tokens[:, :4], torch.cat([x, fresh[None]]))

    @pytest.mark.parametrize("name", ["key", "query", "value", "output"])
    def test_a_perturbed_construction_fails(self, name):
        x, y, start, fresh, context, query = task(12, 4, 3)
        layer = perturbed(gradient_descent_attention(start, 0.2, 12), name)
        right = descent(x, y, start, 0.2, 5)[-1] @ fresh.numpy()
        wrong = -repeated(layer, context, query, 5)[-1, -1, 4:].numpy()
        assert np.abs(wrong - right).max() > 1e-6 * np.abs(right).max()

    def test_another_number_of_examples_is_another_rate(self):
        x, y, start, fresh, context, query = task(12, 4, 3)
        layer = gradient_descent_attention(start, 0.2, 6).requires_grad_(False)
        close(-layer(context, query)[4:], descent(x, y, start, 0.4, 1)[1] @ fresh.numpy())

    def test_the_inputs_are_transformed_by_gd_plus_plus(self):
        x, y, start, _, context, query = task(12, 4, 3)
        gamma, eta = 0.01, 0.2
        layer = gradient_descent_attention(start, eta, 12, curvature=gamma).requires_grad_(False)
        inputs, targets = np.concatenate([x, query[None, :4]]), np.concatenate([y, query[None, 4:]])
        for tokens in repeated(layer, context, query, 5):
            close(tokens, np.concatenate([inputs, targets], axis=-1))
            examples = inputs[:-1]
            residuals = examples @ start.numpy().T - targets[:-1]
            targets = targets + eta / 12 * inputs @ (residuals.T @ examples).T
            inputs = inputs - gamma * inputs @ examples.T @ examples
        plain = gradient_descent_attention(start, eta, 12)(context, query)
        assert relative(layer(context, query), plain) > 1e-3  # the control: γ matters

    def test_gd_plus_plus_learns_faster(self):
        context, query, target = regression_prompts(500, 20, 5, torch.Generator().manual_seed(3))

        def loss(step_size, curvature):
            layer = gradient_descent_attention(torch.zeros(1, 5).double(), step_size, 20, curvature)
            predictions = -repeated(layer.requires_grad_(False), context, query, 2)[:, -1, -1, -1]
            return (predictions - target).square().mean().item()

        rates = np.arange(0.5, 6, 0.5).tolist()
        assert loss(4.5, 0.03) < 0.5 * min(loss(rate, 0.0) for rate in rates)

    def test_batches(self):
        context, query, _ = regression_prompts(6, 5, 3, torch.Generator().manual_seed(0))
        layer = gradient_descent_attention(torch.zeros(1, 3).double(), 0.5, 5).requires_grad_(False)
        close(layer(context, query), torch.stack([layer(c, q) for c, q in zip(context, query, strict=True)]))
        assert repeated(layer, context, query, 2).shape == (6, 3, 6, 4)

    def test_the_librarys_linear_attention_does_the_same_from_zero(self):
        """With W₀ = 0 the query's own value is zero, so an average over the query too is the same up to its length."""
        *_, fresh, context, _ = task(7, 3, 2)
        start = torch.zeros(2, 3).double()
        query = torch.cat([fresh, torch.zeros(2).double()])
        own = gradient_descent_attention(start, 0.3, 7, mean=True)
        library = LinearAttention(dim=5).double()
        for name in ("key", "query", "value", "output"):
            getattr(library, name).weight.data = getattr(own, name).weight.data
        close((query + library(context, query)).detach(), own(context, query).detach())
        close(own(context, query).detach(), gradient_descent_attention(start, 0.3, 7)(context, query).detach())

    def test_errors(self):
        start = torch.zeros(1, 2)
        for bad, match in (
            (dict(step_size=0.0), "step_size is 0.0: give a positive number"),
            (dict(step_size=float("nan")), "step_size is nan: give a finite number"),
            (dict(curvature=True), "curvature is True"),
            (dict(examples=0), "examples is 0: give a whole number"),
            (dict(initial=torch.zeros(2)), "initial has shape"),
            (dict(initial=torch.zeros(3, 1, 2)), r"give one matrix \[out, in\]"),
            (dict(initial=torch.full((1, 2), torch.inf)), r"initial\[0, 0\] is inf"),
        ):
            with pytest.raises(ValueError, match=match):
                gradient_descent_attention(**{"initial": start, "step_size": 0.1, "examples": 3, **bad})
        layer = gradient_descent_attention(start, 0.1, 3)
        with pytest.raises(ValueError, match="steps is -1"):
            repeated(layer, torch.zeros(3, 3), torch.zeros(3), -1)
        with pytest.raises(ValueError, match="query has 4 features and this layer reads 3"):
            layer(torch.zeros(3, 4), torch.zeros(4))
        with pytest.raises(ValueError, match="layer is a Linear"):
            repeated(nn.Linear(2, 2), torch.zeros(3, 3), torch.zeros(3), 1)
        with pytest.raises(ValueError, match="mean is 1: give True or False"):
            LinearSelfAttention(3, mean=1)


class TestMerged:
    def test_the_function_is_the_same(self):
        layer = LinearSelfAttention(4).double()
        context, query = normal((9, 4), (4,))
        close(merged(layer)(context, query), layer(context, query).detach())
        layer.query.weight.data *= -1
        close(merged(layer)(context, query), layer(context, query).detach())
        assert merged(layer).query.weight.trace() >= 0
        assert merged(layer).query.weight.norm().item() == pytest.approx(2.0)

    def test_ends_and_middle(self):
        a, b = LinearSelfAttention(4).double(), LinearSelfAttention(4).double()
        context, query = normal((9, 4), (4,))
        close(interpolated(a, b, 0.0)(context, query), a(context, query).detach())
        close(interpolated(a, b, 1.0)(context, query), b(context, query).detach())
        middle = interpolated(a, b, 0.5)
        close(middle.value.weight, (merged(a).value.weight + merged(b).value.weight) / 2)
        assert relative(middle(context, query), a(context, query)) > 1e-3

    def test_errors(self):
        a = LinearSelfAttention(4)
        with pytest.raises(ValueError, match="give layers of the same form"):
            interpolated(a, LinearSelfAttention(3), 0.5)
        with pytest.raises(ValueError, match="position is inf"):
            interpolated(a, a, float("inf"))
        a.key.weight.data.zero_()
        with pytest.raises(ValueError, match="it reads nothing"):
            merged(a)


def random_block(contextual, dim=6):
    torch.manual_seed(1)
    mlp = nn.Sequential(nn.Linear(dim, 20), nn.GELU(), nn.Linear(20, 3))
    return ContextualBlock(contextual, mlp).double().requires_grad_(False)


def edited_by(block, update):
    """A block with the weights W + ΔW in it."""
    copy = random_block(block.contextual)
    copy.load_state_dict(block.state_dict())
    copy.first_linear.weight += update.dense()
    return copy


class TestQueryIndependence:
    @pytest.mark.parametrize("mean", [False, True])
    def test_context_matrix(self, mean):
        layer = LinearSelfAttention(6, mean).double().requires_grad_(False)
        context, queries = normal((9, 6), (50, 6))
        matrix = context_matrix(layer, context).dense()
        K, Q, V, P = (getattr(layer, name).weight.numpy() for name in ("key", "query", "value", "output"))
        c = context.numpy()
        close(matrix, P @ V @ c.T @ c @ K.T @ Q / (10 if mean else 1))
        close(layer.update(context, queries), queries + queries @ matrix.T)

    def test_query_independent_update(self):
        block = random_block(LinearSelfAttention(6))
        context, queries = normal((9, 6), (50, 6))
        one = edited_by(block, query_independent_update(block, context))
        for query in queries:
            assert relative(one(context[:0], query), block(context, query)) < 1e-12
            assert relative(block(context[:0], query), block(context, query)) > 1e-6  # the control: no edit
        maps = [getattr(block.contextual, name).weight.numpy() for name in ("key", "query", "value", "output")]
        derived = symbolic.query_independent_update().lambdify()(
            block.first_linear.weight.numpy(), context.numpy().T, *maps
        )
        close(query_independent_update(block, context).dense(), derived)

    def test_a_prompt_of_the_construction_is_the_gradient_step(self):
        x, y, start, _, context, _ = task(9, 4, 2)
        layer = gradient_descent_attention(start, 0.3, 9).requires_grad_(False)
        wanted = np.zeros((6, 6))
        wanted[4:, :4] = start.numpy() - descent(x, y, start, 0.3, 1)[1]
        close(context_matrix(layer, context).dense(), wanted)

    def test_the_implicit_update_is_what_one_query_sees_of_it(self):
        block = random_block(LinearSelfAttention(6))
        context, query = normal((9, 6), (6,))
        everything = query_independent_update(block, context).dense()
        seen = everything @ torch.outer(query, query) / (query @ query)
        close(implicit_update(block, context, query).weight.dense(), seen)
        assert relative(seen.flatten(), everything.flatten()) > 0.1

    def test_independent_queries_determine_it(self):
        block = random_block(LinearSelfAttention(6))
        context, queries = normal((9, 6), (6, 6))
        changes = torch.stack([block.read(context, q) - q for q in queries]) @ block.first_linear.weight.T
        wanted = query_independent_update(block, context).dense()
        torch.testing.assert_close(least_norm_edit(queries, changes).dense(), wanted, rtol=1e-10, atol=1e-10)  # κ ≈ 30
        assert relative(least_norm_edit(queries[:5], changes[:5]).dense().flatten(), wanted.flatten()) > 0.01

    def test_softmax_attention_has_no_such_edit(self):
        layer = LinearSelfAttention(6).double()
        for weight in layer.parameters():
            weight.data *= 3
        context, queries, fresh = normal((9, 6), (6, 6), (50, 6))
        shares = {}
        for mix in (0.0, 0.5, 1.0):
            block = random_block(InterpolatedAttention(layer, mix))
            W = block.first_linear.weight

            def changed(asked, block=block, W=W):
                return torch.stack([block.read(context, q) - q for q in asked]) @ W.T

            edit = least_norm_edit(queries, changed(queries))
            torch.testing.assert_close(
                share_served(edit, queries, changed(queries)), torch.tensor(1.0).double(), rtol=1e-12, atol=1e-12
            )
            shares[mix] = share_served(edit, fresh, changed(fresh)).item()
        assert shares[0.0] == pytest.approx(1, abs=1e-12)
        assert shares[1.0] < shares[0.5] < 0.999

    def test_the_ends_of_the_interpolation(self):
        layer = LinearSelfAttention(6).double().requires_grad_(False)
        context, query = normal((9, 6), (6,))
        close(InterpolatedAttention(layer, 0.0)(context, query), layer(context, query))
        scores = (context @ layer.key.weight.T @ layer.query.weight @ query).numpy()
        weights = 9 * np.exp(scores) / np.exp(scores).sum()
        written = (layer.output.weight @ layer.value.weight @ context.T).numpy() @ weights
        close(InterpolatedAttention(layer, 1.0)(context, query), query.numpy() + written)
        close(InterpolatedAttention(layer, 1.0)(context[:0], query), query)

    def test_least_squares_edit(self):
        reads, changes = normal((9, 4), (9, 3))
        fitted = np.linalg.lstsq(reads.numpy(), changes.numpy(), rcond=None)[0].T
        close(least_squares_edit(reads, changes).dense(), fitted)
        few = least_squares_edit(reads[:3], changes[:3])
        close(few.dense(), least_norm_edit(reads[:3], changes[:3]).dense())
        assert relative(few.dense().flatten(), torch.as_tensor(fitted).flatten()) > 0.1

    def test_share_served(self):
        reads, changes = normal((8, 6), (8, 4))
        edit = LowRank(*normal((4, 2), (6, 2), seed=3))
        missed = changes.numpy() - reads.numpy() @ edit.dense().numpy().T
        close(share_served(edit, reads, changes), 1 - (missed**2).sum() / (changes.numpy() ** 2).sum())

    def test_errors(self):
        layer = LinearSelfAttention(6).double()
        context = torch.zeros(3, 6).double()
        with pytest.raises(ValueError, match="no other layer has the matrix"):
            context_matrix(LinearAttention(6), context)
        skipping = ContextualBlock(layer, nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)).double(), skip=True)
        with pytest.raises(ValueError, match="skip=True"):
            query_independent_update(skipping, context)
        with pytest.raises(ValueError, match="mix is 2: give a number from 0"):
            InterpolatedAttention(layer, 2)
        with pytest.raises(ValueError, match="layer has mean=True"):
            InterpolatedAttention(LinearSelfAttention(6, mean=True), 0.5)
        edit = LowRank(torch.eye(2), torch.eye(2))
        with pytest.raises(ValueError, match="one change for each"):
            least_squares_edit(torch.eye(3), torch.eye(2))
        with pytest.raises(ValueError, match=r"reads\[0, 0\] is nan"):
            least_squares_edit(torch.full((2, 2), torch.nan), torch.eye(2))
        with pytest.raises(ValueError, match="changes are all zero"):
            share_served(edit, torch.eye(2), torch.zeros(2, 2))
        with pytest.raises(ValueError, match=r"give an edit \[out, in\]"):
            share_served(edit, torch.eye(3), torch.eye(2))


class TestTokenByToken:
    def test_the_mean_layer_is_a_running_average(self):
        _, _, start, _, context, query = task(9, 4, 2)
        block = random_block(gradient_descent_attention(start, 0.3, 9, mean=True))
        path = trajectory(block, context, query)
        steps = normalised_lms(path)
        close(steps.rates[:, 0], 1 / np.arange(2, 11))
        torch.testing.assert_close(steps.marginal_norms, path.marginal_norms, rtol=1e-12, atol=1e-14)
        whole = random_block(gradient_descent_attention(start, 0.3, 9))
        close(path.updates[-1].dense(), implicit_update(whole, context, query).weight.dense())

    def test_the_sum_is_not_an_average_and_adds_one_examples_gradient_a_token(self):
        x, y, start, _, context, query = task(9, 4, 2)
        block = random_block(gradient_descent_attention(start, 0.3, 9))
        path = trajectory(block, context, query)
        with pytest.raises(ValueError, match="has no method `average`"):
            normalised_lms(path)
        W, q = block.first_linear.weight.numpy(), query.numpy()
        for i in range(9):
            slope = np.outer(start.numpy() @ x[i].numpy() - y[i].numpy(), x[i].numpy())  # at W₀, for every token
            matrix = np.zeros((6, 6))
            matrix[4:, :4] = 0.3 / 9 * slope
            close(path.increments[i].dense(), W @ matrix @ np.outer(q, q) / (q @ q))


class TestTraining:
    def test_prompts(self):
        context, query, target = regression_prompts(5, 8, 3, torch.Generator().manual_seed(0))
        for one, q, t in zip(context.numpy(), query.numpy(), target.numpy(), strict=True):
            w = np.linalg.lstsq(one[:, :3], one[:, 3], rcond=None)[0]
            assert t == pytest.approx(w @ q[:3], rel=1e-9)
            assert q[3] == 0
            assert np.abs(one[:, :3]).max() <= 1

    @pytest.mark.slow
    def test_training_finds_the_construction(self):
        trained, untrained = train_linear_attention(examples=10, features=3, steps=1200, batch=256)
        context, query, target = regression_prompts(4000, 10, 3, torch.Generator().manual_seed(9))

        def loss(layer):
            return (layer(context, query)[:, -1] + target).square().mean().item()

        start = torch.zeros(1, 3).double()
        built = min(loss(gradient_descent_attention(start, eta, 10)) for eta in np.arange(0.5, 4, 0.1).tolist())
        assert built < 0.5 * loss(untrained)
        assert loss(trained) == pytest.approx(built, rel=0.05)

    def test_a_size_that_is_none(self):
        with pytest.raises(ValueError, match="steps is 0: give a whole number"):
            train_linear_attention(examples=3, features=2, steps=0)
        with pytest.raises(ValueError, match="count is 0"):
            regression_prompts(0, 3, 2, torch.Generator())
