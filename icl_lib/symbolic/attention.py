r"""Attention over a single token: the scores do not matter."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import latex, stacked

DIM, HEAD = sp.symbols("d h", integer=True, positive=True)
TOKENS = sp.Symbol("n", integer=True, positive=True)


@cache
def single_token_attention() -> Derivation:
    r"""Derive what attention returns when a token has only itself to attend to.

    $$A(x) = W_O W_V\, x$$

    The weights are the softmax of scores $s_1 \dots s_n$, defined by $\alpha_i = e^{s_i} / \sum_j e^{s_j}$ with $n$ a
    symbol; then $n$ is set to one. The score is not in the result, so neither are the query and the key.

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
    W_O, W_V = sp.MatrixSymbol("W_O", DIM, HEAD), sp.MatrixSymbol("W_V", HEAD, DIM)
    x = sp.MatrixSymbol("x", DIM, 1)
    i, j = sp.symbols("i j", integer=True, positive=True)
    scores = sp.IndexedBase("s", real=True)

    weight = sp.exp(scores[i]) / sp.Sum(sp.exp(scores[j]), (j, 1, TOKENS))
    # as_dummy gives both sums the same bound variable.
    total = rewritten(sp.factor_terms(sp.Sum(weight, (i, 1, TOKENS))).as_dummy(), sp.S.One)
    only_weight = weight.subs({TOKENS: 1, i: 1}).doit()

    # The columns of Z are the tokens; with n = 1 it is the one column x, and the weights are 1 × 1.
    Z, weights = sp.MatrixSymbol("Z", DIM, TOKENS), sp.MatrixSymbol(r"\boldsymbol{\alpha}", TOKENS, 1)
    of_many = W_O * W_V * Z * weights
    one = {Z.subs(TOKENS, 1): x, weights.subs(TOKENS, 1): only_weight * sp.Identity(1)}
    attention = of_many.subs(TOKENS, 1).xreplace(one).doit()

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {"definition, for one token": attention - candidate}

    return Derivation(
        name="single_token_attention",
        source="Vaswani et al. 2017 (arXiv 1706.03762), equation 1, for one token",
        assumptions=(
            Step(
                "Softmax",
                weight,
                rf"\alpha_i = {latex(weight)}",
                "The attention weights of $n$ tokens are the exponentials of their scores, divided by their sum; "
                "the scores may be any numbers.",
            ),
            Step(
                "Attention",
                of_many,
                r"A = \sum_{i=1}^{n} \alpha_i\, W_O W_V\, z_i",
                "Each token $z_i$ contributes its value, passed through the output map, in proportion to its weight.",
            ),
        ),
        steps=(
            Step(
                "Weights sum to one",
                sp.Eq(sp.Sum(weight, (i, 1, TOKENS)), total),
                rf"\sum_{{i=1}}^{{n}} \alpha_i = {latex(total)}",
                "Their common denominator is the sum of the numerators, for every number $n$ of tokens: attention is "
                "an average.",
            ),
            Step(
                "One token",
                only_weight,
                stacked(r"n = 1", rf"\alpha_1 = \frac{{e^{{s_1}}}}{{e^{{s_1}}}} = {latex(only_weight)}"),
                "SymPy sets $n = 1$ in the definition, and the score cancels, whatever it was.",
            ),
            Step(
                "Attention to itself",
                attention,
                rf"A(x) = {latex(attention)}",
                "The sum has this one term, and its token is the query $x$: queries and keys play no part.",
            ),
        ),
        result=attention,
        latex=rf"A(x) = {latex(attention)}",
        arguments={"W_O": W_O, "W_V": W_V, "x": x},
        shapes={"W_O": "dim head", "W_V": "head dim", "x": "dim", "return": "dim"},
        must_vanish=must_vanish,
    )
