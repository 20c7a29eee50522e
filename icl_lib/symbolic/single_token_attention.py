r"""Attention over a single token: the scores do not matter."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step
from icl_lib.symbolic.notation import HEAD, WIDTH, matrix, number, vector

TOKENS = sp.Symbol("n", integer=True, positive=True)


@cache
def single_token_attention() -> Derivation:
    r"""Derive what attention returns when a token has only itself to attend to.

    $$A(x) = W_O W_V\, x$$

    The weights are the softmax of scores $s_1 \dots s_n$, $\alpha_i = e^{s_i} / \sum_j e^{s_j}$ with $n$ a symbol; then
    $n$ is set to one. The score is not in the result, so neither are the query and the key.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 1, for one token.

    Shapes: the result, $A(x)$ ``[dim]``, is a function of ``W_O`` ``[dim, head]``, ``W_V`` ``[head, dim]`` and ``x``
    ``[dim]``, of any sizes.

    >>> import numpy as np
    >>> derivation = single_token_attention()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([[2.0], [0.0]]), np.array([[1.0, 1.0]]), np.array([3.0, 4.0]))
    array([14.,  0.])
    """
    W_O, W_V, x = matrix("W_O", WIDTH, HEAD), matrix("W_V", HEAD, WIDTH), vector("x", WIDTH)
    i, j = sp.symbols("i j", integer=True, positive=True)
    scores = sp.IndexedBase("s", real=True)
    share, all_shares, first = number(r"\alpha_i"), number(r"\sum_{i=1}^{n} \alpha_i"), number(r"\alpha_1")
    answer = sp.MatrixSymbol(r"A(x)", WIDTH, 1)

    weight = sp.exp(scores[i]) / sp.Sum(sp.exp(scores[j]), (j, 1, TOKENS))
    # as_dummy gives both sums the same bound variable, so that they cancel.
    added = sp.factor_terms(sp.Sum(weight, (i, 1, TOKENS))).as_dummy()
    only_weight = weight.subs({TOKENS: 1, i: 1}).doit()

    # The columns of Z are the tokens. With n = 1 there is one column, and one weight.
    tokens, weights = matrix("Z", WIDTH, TOKENS), vector(r"\alpha", TOKENS)
    of_many = W_O * W_V * tokens * weights
    output = sp.MatrixSymbol(r"A(z_1 \dots z_n)", WIDTH, 1)
    alone = of_many.subs(TOKENS, 1).xreplace({tokens.subs(TOKENS, 1): x, weights.subs(TOKENS, 1): sp.Identity(1)})
    result = (only_weight * alone).doit()

    return Derivation(
        name="single_token_attention",
        source="Vaswani et al. 2017 (arXiv 1706.03762), equation 1, for one token",
        assumptions=dict(
            softmax=Step(
                "**Softmax.** The attention weights of $n$ tokens are the exponentials of their scores, divided by "
                "their sum. The scores may be any numbers.",
                Identity(share, weight),
            ),
            attention=Step(
                "**Attention.** The tokens are the columns of $Z$, the weights the entries of $\\boldsymbol{\\alpha}$. "
                "Each token contributes its value, mapped to the output, in proportion to its weight.",
                Identity(output, of_many),
            ),
        ),
        steps=dict(
            sum_to_one=Step(
                "**The weights sum to one.** For every number $n$ of tokens, attention is an average.",
                Identity(all_shares, sp.S.One),
            ),
            one_token=Step("**One token.** With $n = 1$ the score cancels, whatever it is.", Identity(first, sp.S.One)),
            itself=Step(
                "**Attention to itself.** The only token is the query. Neither its query vector nor its key enters.",
                Asked(answer, first * W_O * W_V * x, result),
            ),
        ),
        unknown=answer,
        result=result,
        statement=Asked(answer, W_O * W_V * x),
        arguments={"W_O": W_O, "W_V": W_V, "x": x},
        names={share: weight, all_shares: added, first: only_weight, output: of_many},
        beyond=lambda candidate: (Identity(_sizes(candidate).as_explicit(), _by_definition(W_O, W_V, x)),),
    )


def _sizes(whole: sp.MatrixExpr) -> sp.MatrixExpr:
    return whole.subs({WIDTH: 2, HEAD: 2})


def _by_definition(W_O: sp.MatrixSymbol, W_V: sp.MatrixSymbol, x: sp.MatrixSymbol) -> sp.ImmutableMatrix:
    """Return softmax attention over the one token x, summed entry by entry, for width 2."""
    score = sp.Symbol("s", real=True)
    output, value, token = (_sizes(symbol) for symbol in (W_O, W_V, x))
    shares = [sp.exp(score) / sum([sp.exp(score)])]
    return sp.ImmutableMatrix(
        2,
        1,
        lambda row, _: sum(
            share * output[row, h] * value[h, k] * token[k, 0] for share in shares for h in range(2) for k in range(2)
        ),
    )
