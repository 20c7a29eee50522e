"""Contextual layers against plain NumPy loops."""

import numpy as np
import pytest
import torch
from cases import prompt

from icl_lib import GRU, LinearAttention, MeanPooling, SoftmaxAttention, symbolic


def numpy_attention(layer, context, query, weigh):
    """One head and one token at a time."""
    w_q, w_k, w_v, w_o = (m.weight.detach().numpy() for m in (layer.query, layer.key, layer.value, layer.output))
    tokens = [*context.numpy(), query.numpy()]
    read = []
    for head in range(layer.heads):
        rows = slice(head * layer.head_dim, (head + 1) * layer.head_dim)
        scores = np.array([(w_k[rows] @ t) @ (w_q[rows] @ query.numpy()) for t in tokens])
        read.append(sum(a * (w_v[rows] @ t) for a, t in zip(weigh(scores, layer.head_dim), tokens, strict=True)))
    return w_o @ np.concatenate(read)


def softmax(scores, head_dim):
    exps = np.exp(scores / np.sqrt(head_dim))
    return exps / exps.sum()


@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("heads", [1, 2])
def test_attention(n, heads):
    context, query = prompt(n, 4)
    for kind, weigh in [(SoftmaxAttention, softmax), (LinearAttention, lambda scores, _: scores / len(scores))]:
        layer = kind(4, heads, head_dim=3).double()
        np.testing.assert_allclose(
            layer(context, query).detach(), numpy_attention(layer, context, query, weigh), rtol=1e-12, atol=1e-14
        )


def test_one_token_attends_to_itself_as_derived():
    layer, (context, query) = SoftmaxAttention(4).double(), prompt(0, 4)
    formula = symbolic.single_token_attention().lambdify("torch")
    with torch.no_grad():
        derived = torch.as_tensor(formula(layer.output.weight, layer.value.weight, query)).reshape(-1)
        torch.testing.assert_close(layer(context, query), derived, rtol=1e-12, atol=1e-14)
        assert not torch.allclose(layer(*prompt(1, 4)), derived, rtol=1e-3)  # negative control: two tokens


@pytest.mark.parametrize("n", [0, 1, 9])
def test_gru(n):
    layer, (context, query) = GRU(4, 5).double(), prompt(n, 4)
    cell = layer.cell
    w_i, w_h, b_i, b_h = (
        getattr(cell, name).detach().numpy() for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    )
    state = np.zeros(5)
    for token in [*context.numpy(), query.numpy()]:
        (r_i, z_i, n_i), (r_h, z_h, n_h) = np.split(w_i @ token + b_i, 3), np.split(w_h @ state + b_h, 3)
        reset, update = 1 / (1 + np.exp(-(r_i + r_h))), 1 / (1 + np.exp(-(z_i + z_h)))
        state = (1 - update) * np.tanh(n_i + reset * n_h) + update * state
    np.testing.assert_allclose(layer(context, query).detach(), state, rtol=1e-12)


def test_mean_pooling():
    context, query = prompt(9, 4)
    np.testing.assert_allclose(MeanPooling()(context, query), np.vstack([context, query]).mean(0), rtol=1e-12)
    assert torch.equal(MeanPooling()(context[:0], query), query)


@pytest.mark.parametrize("batch", [(2,), (2, 3), (0,)])
def test_batches_are_single_prompts_stacked(batch):
    context, query = prompt(5, 4, batch=batch)
    for layer in (SoftmaxAttention(4, 2), LinearAttention(4, 2), GRU(4, 5), MeanPooling()):
        layer = layer.double()
        together = layer(context, query)
        assert together.shape[:-1] == batch
        for index in np.ndindex(*batch):
            torch.testing.assert_close(together[index], layer(context[index], query[index]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [True, False])
def test_at_every_position(causal):
    layer = SoftmaxAttention(4, 2).double()
    sequence = torch.randn(6, 4).double()
    outputs = layer.at_every_position(sequence, causal)
    for i in range(6):
        others = sequence[:i] if causal else torch.cat([sequence[:i], sequence[i + 1 :]])
        torch.testing.assert_close(outputs[i], layer(others, sequence[i]), rtol=1e-12, atol=1e-14)
    assert not torch.allclose(layer.at_every_position(sequence, not causal)[0], outputs[0], rtol=1e-3)


def test_heads_that_do_not_divide_are_an_error():
    with pytest.raises(ValueError, match="dim=4 is not a multiple of heads=3"):
        SoftmaxAttention(4, 3)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_averages_against_the_layer_on_each_prefix(n, batch):
    context, query = prompt(n, 4, batch=batch)
    for layer in (SoftmaxAttention(4, 2, head_dim=3).double(), LinearAttention(4, 2).double(), MeanPooling()):
        average = layer.average(context, query)
        read = average.read(average.heads())
        for i in range(n + 1):
            torch.testing.assert_close(read[..., i, :], layer(context[..., :i, :], query), rtol=1e-12, atol=1e-14)
        assert read.shape[-2] == n + 1
        shares = average.read_each(average.heads()).sum(-2)
        torch.testing.assert_close(shares, read, rtol=1e-12, atol=1e-14)
        if n == 9:  # negative control
            assert not torch.allclose(read[..., 8, :], read[..., 9, :], rtol=1e-3)


@pytest.mark.parametrize("batch", [(), (2, 3)])
@pytest.mark.parametrize("n", [0, 1, 9])
def test_gru_prefixes_against_the_layer_on_each_prefix(n, batch):
    layer, (context, query) = GRU(4, 5).double(), prompt(n, 4, batch=batch)
    read = layer.prefixes(context, query)
    for i in range(n + 1):
        torch.testing.assert_close(read[..., i, :], layer(context[..., :i, :], query), rtol=1e-12, atol=1e-14)


def test_rates_of_softmax_attention_are_its_weights():
    layer, (context, query) = SoftmaxAttention(4).double(), prompt(9, 4)
    rates = layer.average(context, query).rates[:, 0].detach().numpy()
    w_q, w_k = layer.query.weight.detach().numpy(), layer.key.weight.detach().numpy()
    scores = np.array([(w_k @ t) @ (w_q @ query.numpy()) for t in [query.numpy(), *context.numpy()]])
    expected = [softmax(scores[: i + 2], layer.head_dim)[-1] for i in range(9)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
