"""A prompt read token by token: against separate passes over each prefix, and gradients that autograd takes."""

import copy
import functools
import itertools

import cases
import pytest
import torch
from torch import nn

from icl_lib import (
    GRU,
    ContextualBlock,
    ImplicitUpdate,
    LinearAttention,
    LowRank,
    MeanPooling,
    SoftmaxAttention,
    implicit_update,
)
from icl_lib.blocks.contextual import tokens
from icl_lib.dynamics import answers, eaten_from_left, normalised_lms, step_alignment, task_gradients, trajectory
from icl_lib.dynamics.prefixes import read_prefixes, read_suffixes

DIM = 12


class Shifting(SoftmaxAttention):
    """Attention whose query has a position that shifts when a token is appended."""

    def forward(self, context, query):
        return super().forward(context, query + torch.sin(torch.arange(self.dim) + context.shape[-2]))


class LastThree(SoftmaxAttention):
    """Attention through a window: the oldest token drops out when a fourth comes."""

    def forward(self, context, query):
        return super().forward(context[..., -3:, :], query)


class Recency(nn.Module):
    """An average that has neither a method `average` nor `prefixes`."""

    def forward(self, context, query):
        decay = 0.5 ** torch.arange(context.shape[-2], -1, -1, dtype=query.dtype)
        return (decay[:, None] * tokens(context, query)).sum(-2)


class Shuffled(MeanPooling):
    """A layer whose `average` takes its tokens in another order: right for none, one and all of them."""

    def average(self, context, query):
        return super().average(torch.cat([context[..., :1, :], context[..., 1:, :].flip(-2)], dim=-2), query)


AVERAGES = {
    "softmax, one head": lambda: SoftmaxAttention(DIM),
    "softmax, 4 heads": lambda: SoftmaxAttention(DIM, heads=4),
    "linear, one head": lambda: LinearAttention(DIM),
    "linear, 4 heads": lambda: LinearAttention(DIM, heads=4),
    "mean": MeanPooling,
}
OTHERS = {
    "GRU": lambda: GRU(DIM, DIM),
    "shifting": lambda: Shifting(DIM),
    "window": lambda: LastThree(DIM),
    "recency": Recency,
    "shuffled": Shuffled,
}
LENGTHS = [1, 2, 8, 50]
draw, block_of = functools.partial(cases.prompt, dim=DIM), functools.partial(cases.block_of, dim=DIM)


def close(actual, expected, scale=None):
    """Require equality up to rounding, relative to the largest entry or to ``scale``: small entries are differences of
    large numbers."""
    actual, expected = actual.detach(), expected.detach()
    scale = expected.abs().max() if scale is None else torch.as_tensor(scale).detach()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12 * float(scale))


def dense_weights(block, context, query):
    """The W_i from separate passes, each the theorem's update of one prefix."""
    weight = block.first_linear.weight.detach()
    later = [implicit_update(block, context[:i], query).weight.dense() for i in range(1, len(context) + 1)]
    return [weight, *(weight + update for update in later)]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", [*AVERAGES, *OTHERS])
def test_the_trajectory_is_the_theorem_for_every_prefix(name, n):
    block, (context, query) = block_of({**AVERAGES, **OTHERS}[name]()), draw(n)
    path = trajectory(block, context, query)
    weights = dense_weights(block, context, query)
    for i, weight in enumerate(weights):
        close(path.weight + path.updates[i].dense(), weight)
    for i, (before, after) in enumerate(itertools.pairwise(weights)):
        close(path.increments[i].dense(), after - before, scale=weights[0].abs().max())
        close(path.marginal_norms[i], (after - before).norm(), scale=weights[0].norm())
    # With edited weights, the block on the bare query outputs what it outputs for each prefix.
    answered = answers(block, path.updates, query)
    for i in range(n + 1):
        close(answered[i], block(context[:i], query))
    assert not torch.allclose(answered[0], answered[n], rtol=1e-3)  # negative control


@pytest.mark.parametrize("name", ["softmax, 4 heads", "GRU"])
def test_with_a_skip_connection_the_bias_moves_too(name):
    block, (context, query) = block_of({**AVERAGES, **OTHERS}[name](), skip=True), draw(8)
    path, eaten = trajectory(block, context, query), eaten_from_left(block, context, query)
    answered = answers(block, path.updates, query, path.bias_updates)
    without = answers(block, path.updates, query)
    for i in range(9):
        close(answered[i], block(context[:i], query))
        edited = ImplicitUpdate(eaten.after(i), eaten.bias_after(i)).apply(block)
        close(edited(context[i:], query), block(context, query))
    assert not torch.allclose(without[8], answered[8], rtol=1e-3)  # negative control: the weight update alone
    with pytest.raises(ValueError, match="bias is given, but the block has no skip connection"):
        answers(block_of(MeanPooling()), path.updates, query, path.bias_updates)


def test_a_map_that_the_contextual_layer_shares_is_edited_in_the_mlp_only():
    shared = nn.Linear(DIM, DIM)

    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = shared

        def forward(self, context, query):
            return self.projection(tokens(context, query)).mean(-2)

    block = ContextualBlock(Projected(), nn.Sequential(shared, nn.GELU(), nn.Linear(DIM, DIM))).double()
    context, query = draw(6)
    path = trajectory(block, context, query)
    close(answers(block, path.updates, query)[6], block(context, query))
    gradient = task_gradients(block, path.updates, query, lambda output: output.sum(-1))
    assert gradient.shape == (7, DIM, DIM)


def test_batches_and_skips():
    block, (context, query) = block_of(SoftmaxAttention(DIM, heads=3), skip=True), draw(9, batch=(2, 3))
    path, eaten = trajectory(block, context, query), eaten_from_left(block, context, query)
    assert path.updates.shape == (2, 3, 10, 4 * DIM, DIM)
    assert path.updates.right.shape[-3] == 1, "the right factor is shared"
    one, alone = trajectory(block, context[1, 2], query[1, 2]), eaten_from_left(block, context[1, 2], query[1, 2])
    close(path.updates[1, 2].dense(), one.updates.dense())
    close(path.step_size[1, 2], one.step_size)
    close(eaten.steps[1, 2].dense(), alone.steps.dense())
    close(normalised_lms(path).before[1, 2], normalised_lms(one).before)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", [*AVERAGES, *OTHERS])
def test_each_step_is_a_gradient_step_on_a_linear_loss(name, n):
    """Dherin et al., version 1, Proposition 3.1, for every contextual layer; the gradient is autograd's."""
    block, (context, query) = block_of({**AVERAGES, **OTHERS}[name]()), draw(n)
    path = trajectory(block, context, query)
    weights, read = dense_weights(block, context, query), [block.read(context[:i], query) for i in range(n + 1)]
    before, after = path.linear_losses()
    for i in range(1, n + 1):
        delta = torch.outer(weights[0] @ (read[i - 1] - read[i]), read[0])
        close(path.linear_gradients[i - 1].dense(), delta, scale=(weights[0] @ read[0]).norm() * read[0].norm())
        at = weights[i - 1].clone().requires_grad_()
        loss = (delta * at).sum()  # tr(Δᵀ U)
        (gradient,) = torch.autograd.grad(loss, at)
        close(weights[i - 1] - path.step_size * gradient, weights[i])
        assert not torch.allclose(weights[i - 1] + path.step_size * gradient, weights[i], rtol=1e-6)  # uphill
        scale = delta.norm() * weights[0].norm()
        close(before[i - 1], loss.detach(), scale)
        close(after[i - 1], (delta * weights[i]).sum(), scale)
    assert bool((after < before).all())
    total = path.increments.dense().sum(0)
    close(total, weights[-1] - weights[0])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", AVERAGES)
def test_each_step_is_normalised_lms_on_a_quadratic_loss(name, n):
    """The targets and rates are the library's, the gradient is autograd's, at the weights before each step."""
    block, (context, query) = block_of(AVERAGES[name]()), draw(n)
    path = trajectory(block, context, query)
    reading = normalised_lms(path)
    weights, start = dense_weights(block, context, query), block.read(context[:0], query).detach()
    largest = weights[0].abs().max()

    def losses(weight, i):
        return (weight @ start - reading.targets[i]).square().sum(-1) / 2  # one a head

    for i in range(n):
        at = weights[i].clone().requires_grad_()
        of_each = losses(at, i)
        gradients = [torch.autograd.grad(loss, at, retain_graph=True)[0] for loss in of_each]
        step = sum(rate * gradient for rate, gradient in zip(reading.step_sizes[i], gradients, strict=True))
        close(at.detach() - step, weights[i + 1], scale=largest)
        assert not torch.allclose(at - 0.9 * step, weights[i + 1], rtol=1e-6, atol=1e-6 * largest)  # another rate
        close(reading.before[i], of_each.detach(), scale=of_each.max())
        close(reading.after[i], losses(weights[i + 1], i), scale=of_each.max())
        close(reading.marginal_norms[i], path.marginal_norms[i], scale=largest)
    if reading.rates.shape[-1] == 1:
        close(reading.after, (1 - reading.rates).square() * reading.before)


@pytest.mark.parametrize("heads", [1, 4])
def test_rates_and_targets_of_softmax_attention(heads):
    """Against the attention weights and values written out: v_i = W_O W_V c_i, α_i the last attention weight."""
    layer, (context, query) = SoftmaxAttention(DIM, heads).double(), draw(8)
    block = block_of(layer)
    reading, weight = normalised_lms(trajectory(block, context, query)), block.first_linear.weight.detach()
    with torch.no_grad():
        for i in range(8):
            sequence = tokens(context[: i + 1], query)
            read, target = [], []
            for h in range(heads):
                rows = slice(h * layer.head_dim, (h + 1) * layer.head_dim)
                scores = (sequence @ layer.key.weight[rows].T) @ (layer.query.weight[rows] @ query)
                attention = torch.softmax(scores / layer.head_dim**0.5, 0)
                close(reading.rates[i, h], attention[i])  # the query stands behind token i
                out = layer.output.weight[:, rows] @ layer.value.weight[rows]
                before = torch.softmax(torch.cat([scores[:i], scores[-1:]]) / layer.head_dim**0.5, 0)
                read.append(before @ (torch.cat([sequence[:i], sequence[-1:]]) @ out.T))
                target.append(out @ context[i])
            for h in range(heads):
                wanted = weight @ (sum(read) - read[h] + target[h])
                close(reading.targets[i, h], wanted)
    if heads == 1:
        close(reading.targets[:, 0], context @ (weight @ layer.output.weight @ layer.value.weight).detach().T)


@pytest.mark.parametrize("name", ["GRU", "shifting", "window"])
def test_where_normalised_lms_does_not_apply_it_says_so_and_the_identity_fails(name):
    block, (context, query) = block_of(OTHERS[name]()), draw(8)
    path = trajectory(block, context, query)
    with pytest.raises(ValueError, match="not a run of normalised LMS: the contextual layer, a "):
        normalised_lms(path)
    # The target W v and the rate of token i must not depend on the earlier context: a value taken from one context does
    # not fit another.
    weight, start = path.weight, path.activations[0]

    def value(context):
        """The v that makes a_n = a_{n−1} + α (v − a_{n−1}), with the rate 1/2."""
        read = trajectory(block, context, query).activations
        return read[-2] + 2 * (read[-1] - read[-2])

    other = torch.cat([draw(7)[0], context[-1:]])
    target = weight @ value(context)
    read = trajectory(block, other, query).activations
    step = torch.outer(weight @ (read[-1] - read[-2]), start) / start.square().sum()
    at = (weight + torch.outer(weight @ (read[-2] - start), start) / start.square().sum()).requires_grad_()
    (gradient,) = torch.autograd.grad((at @ start - target).square().sum() / 2, at)
    cosine = -(gradient * step).sum() / (gradient.norm() * step.norm())
    assert cosine < 0.99, "no rate makes this step a gradient step on the token's loss"


def test_the_same_check_passes_for_an_average():
    """The negative control of the test above: for an average, one value serves every context, at some rate."""
    layer, (context, query) = SoftmaxAttention(DIM).double(), draw(8)
    block = block_of(layer)
    weight = block.first_linear.weight.detach()
    target = weight @ (layer.output.weight @ layer.value.weight @ context[-1]).detach()
    path = trajectory(block, torch.cat([draw(7)[0], context[-1:]]), query)
    start = path.activations[0]
    at = (weight + path.updates[-2].dense()).requires_grad_()
    (gradient,) = torch.autograd.grad((at @ start - target).square().sum() / 2, at)
    step = path.increments[-1].dense()
    close(-(gradient * step).sum() / (gradient.norm() * step.norm()), torch.ones((), dtype=torch.float64))


def test_the_reason_is_named():
    for layer, reason in (
        (Shifting(DIM), "describes, after 0 tokens. Do positions shift when a token is"),
        (Shuffled(), "describes, after 4 tokens"),
        (Recency(), "a Recency, has no method `average`"),
    ):
        with pytest.raises(ValueError, match=reason):
            normalised_lms(trajectory(block_of(layer), *draw(8)))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", [*AVERAGES, *OTHERS])
def test_eating_from_the_left_keeps_the_answer(name, n):
    """Dherin et al., version 1, appendix B; the oracle takes the theorem's step repeatedly, with dense matrices."""
    block, (context, query) = block_of({**AVERAGES, **OTHERS}[name]()), draw(n)
    eaten = eaten_from_left(block, context, query)
    weight = block.first_linear.weight.detach()
    wanted, dense = block(context, query), weight
    for i in range(n + 1):
        close(weight + eaten.after(i).dense(), dense)
        assert int(eaten.after(i).rank()) <= min(i, DIM)
        edited = copy.deepcopy(block)
        with torch.no_grad():
            edited.first_linear.weight.copy_(weight + eaten.after(i).dense())
        close(edited(context[i:], query), wanted)
        if i < n:
            if name in AVERAGES:  # the others forget or drop their oldest tokens
                assert not torch.allclose(edited(context[i + 1 :], query), wanted, rtol=1e-6)
            with torch.no_grad():
                before, r = block.read(context[i:], query), block.read(context[i + 1 :], query)
            step = torch.outer(dense @ (before - r), r) / r.square().sum()
            close(eaten.marginal_norms[i], step.norm(), scale=dense.norm())
            dense = dense + step


def test_the_steps_from_the_left_are_factors_of_a_product():
    """Dherin et al., version 4, Corollary C.3: W times a product without W in it, in this order only."""
    block, (context, query) = block_of(SoftmaxAttention(DIM, heads=4)), draw(6)
    eaten, weight = eaten_from_left(block, context, query), block.first_linear.weight.detach()
    factors = torch.eye(DIM).double() + eaten.factors.dense()
    for i, factor in enumerate(factors):
        close(factor @ eaten.suffixes[i + 1], eaten.suffixes[i])
    close(torch.linalg.multi_dot([weight, *factors]), weight + eaten.after(6).dense())
    backwards = torch.linalg.multi_dot([weight, *factors.flip(0)])
    assert cases.relative(backwards.flatten(), (weight + eaten.after(6).dense()).flatten()) > 1e-2


def test_the_rank_grows_by_one_a_token_up_to_the_width():
    block, (context, query) = block_of(SoftmaxAttention(DIM, heads=4)), draw(20)
    ranks = [int(eaten_from_left(block, context, query).after(i).rank()) for i in range(21)]
    assert ranks == [min(i, DIM) for i in range(21)]
    assert bool((trajectory(block, context, query).updates[1:].rank() == 1).all())


@pytest.mark.parametrize("name", [*AVERAGES, "GRU"])
def test_one_pass_is_enough_where_the_layer_allows_it(name):
    layer = {**AVERAGES, **OTHERS}[name]()
    block, (context, query) = block_of(layer), draw(50)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-2]))
    read = read_prefixes(block, context, query)
    assert sorted(seen) == [0, 1, 25, 50], "the layer itself is run for the check only"
    assert (read.average is None) == (name == "GRU")


def test_suffixes_in_one_pass_and_in_many():
    for layer in (SoftmaxAttention(DIM), GRU(DIM, DIM)):
        block, (context, query) = block_of(layer), draw(6)
        suffixes = read_suffixes(block, context, query)
        for i in range(7):
            close(suffixes[i], block.read(context[i:], query))
        assert not torch.allclose(suffixes[1], suffixes[2], rtol=1e-6)


def test_sharp_attention_loses_nothing():
    """Scores in the hundreds: sums of exponentials would overflow or vanish, differences of their logarithms do not."""
    layer, (context, query) = SoftmaxAttention(DIM).double(), draw(50)
    with torch.no_grad():
        layer.query.weight *= 3000
    block = block_of(layer)
    path = trajectory(block, context, query)
    for i in range(51):
        close(path.activations[i], block.read(context[:i], query).detach())
    assert bool((normalised_lms(path).rates < 1e-300).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    block, (context, query) = block_of(SoftmaxAttention(DIM, heads=4)), draw(20)
    exact = trajectory(block, context, query).activations
    path = trajectory(block.to(dtype), context.to(dtype), query.to(dtype))
    assert path.prefixes.average is not None
    error = (path.activations.double() - exact).norm() / exact.norm()
    assert error < 20 * torch.finfo(dtype).eps


def test_task_gradients_are_autograds():
    block, (context, query) = block_of(SoftmaxAttention(DIM, heads=4), skip=True), draw(5)
    path, target = trajectory(block, context, query), torch.randn(DIM, dtype=torch.float64)
    before = {name: value.clone() for name, value in block.state_dict().items()}

    def loss(output):
        return (output - target).square().sum(-1)

    gradients = task_gradients(block, path.updates, query, loss, path.bias_updates)
    for i in range(6):
        edited = copy.deepcopy(block)
        with torch.no_grad():
            edited.first_linear.weight.add_(path.updates[i].dense())
            edited.last_linear.bias.add_(path.bias_updates[i])
        loss(edited(context[:0], query)).backward()
        close(gradients[i].dense(), edited.first_linear.weight.grad)
    assert not torch.allclose(gradients[0].dense(), gradients[5].dense(), rtol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert not block.first_linear._forward_hooks
    cosines = step_alignment(path, block, query, loss)
    dense = torch.stack([gradients[i].dense() for i in range(5)])
    steps = path.increments.dense()
    close(cosines, -(dense * steps).sum((-2, -1)) / (dense.flatten(1).norm(dim=1) * steps.flatten(1).norm(dim=1)))


def test_a_step_along_the_gradient_has_cosine_one():
    """Positive control: mean pooling, with a loss whose minimum is the image of the token."""
    block = ContextualBlock(MeanPooling(), nn.Linear(DIM, 30, bias=False)).double()
    context, query = draw(5)
    path = trajectory(block, context, query)
    targets = context @ path.weight.mT
    along = step_alignment(path, block, query, lambda output: (output - targets).square().sum(-1))
    close(along, torch.ones(5, dtype=torch.float64))
    away = step_alignment(path, block, query, lambda output: -(output - targets).square().sum(-1))
    close(away, -torch.ones(5, dtype=torch.float64))


def test_wrong_input():
    block, (context, query) = block_of(SoftmaxAttention(DIM)), draw(4)
    path = trajectory(block, context, query)
    with pytest.raises(ValueError, match="block is a Linear: give a ContextualBlock"):
        trajectory(nn.Linear(2, 2), context, query)
    for function in (trajectory, eaten_from_left):
        with pytest.raises(ValueError, match="context is empty"):
            function(block, context[:0], query)
        with pytest.raises(ValueError, match=r"a_without\[.*\] is nan|a_without.* is nan|a_with.* is nan"):
            function(block, context, query * float("nan"))
    with pytest.raises(ValueError, match="a_without is zero"):
        trajectory(ContextualBlock(MeanPooling(), nn.Linear(DIM, 3)).double(), context, 0 * query)
    with pytest.raises(ValueError, match="path is a Tensor: give what"):
        normalised_lms(query)
    with pytest.raises(ValueError, match="path is a Tensor: give what"):
        step_alignment(query, block, query, torch.sum)
    with pytest.raises(ValueError, match=r"query has shape \(1, 1, 12\): give"):
        step_alignment(path, block, query[None, None], torch.sum)
    with pytest.raises(ValueError, match="updates is a Tensor"):
        answers(block, query, query)
    with pytest.raises(ValueError, match="leading dimensions do not broadcast"):
        answers(block, path.updates, query.expand(4, DIM))
    with pytest.raises(ValueError, match="loss is a float: give a function"):
        task_gradients(block, path.updates, query, 0.5)
    with pytest.raises(ValueError, match=r"terms is 5: give a whole number from 0 to 4"):
        eaten_from_left(block, context, query).after(5)
    with pytest.raises(ValueError, match=r"updates.dtype is torch.float32"):
        answers(block, LowRank(torch.zeros(4 * DIM, 1), torch.zeros(DIM, 1)), query)
