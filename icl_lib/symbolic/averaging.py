r"""Linear attention and mean pooling read a plain mean, which one more token moves by one part in their number."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.attention import DIM
from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import stacked
from icl_lib.symbolic.recursion import (
    BEFORE,
    ENTRY,
    INDEX,
    NOW,
    SCORES,
    TOKEN,
    VALUE,
    VALUES,
    canonical,
    softmax_recursion,
    split_off,
)

AVERAGE_FORMULA = rf"{NOW} = {BEFORE} + \frac{{s_i {VALUE} - {BEFORE}}}{{i + 1}}"


@cache
def average_recursion() -> Derivation:
    r"""Derive how linear attention and mean pooling go from $i - 1$ tokens to $i$: at the rate of a plain mean.

    $$a_i = a_{i-1} + \frac{s_i v_i - a_{i-1}}{i + 1} \qquad\text{where}\qquad
    a_i = \frac{1}{i + 1} \sum_{j=0}^{i} s_j v_j$$

    One head of linear attention, averaged over its tokens: $s_j$ is the score of token $j$, not exponentiated, and
    token 0 is the query. It is :func:`~icl_lib.symbolic.softmax_recursion` with the value times its score, $s_i v_i$,
    for the value and $\alpha_i = 1/(i + 1)$, whatever the scores are. Mean pooling has $s_j = 1$, with the token
    itself for $v_j$.

    Source: this book.

    Shapes: the result, $a_i$, is a function of ``i`` ``[]``, the number of tokens in the context, of ``score`` ``[]``,
    ``a_before`` ``[dim]`` and ``v`` ``[dim]``, of any size.

    >>> import numpy as np
    >>> derivation = average_recursion()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array(3.0), np.array(2.0), np.array([4.0, 0.0]), np.array([0.0, 8.0]))
    array([3., 4.])
    """

    def read(among: sp.Expr) -> sp.Expr:
        return sp.Sum(SCORES[INDEX] * VALUES[INDEX, ENTRY], (INDEX, 0, among)) / (among + 1)

    before, now = canonical(read(TOKEN - 1)), split_off(read(TOKEN))
    weighted, was, value = sp.Dummy("N"), sp.Symbol("a", real=True), VALUES[TOKEN, ENTRY]
    sums = {canonical(sp.numer(before)): weighted}
    [solved] = sp.solve(before.xreplace(sums) - was, weighted, dict=True)
    found = rewritten(now.xreplace(sums).xreplace(solved), was + (SCORES[TOKEN] * value - was) / (TOKEN + 1))

    a_before, v = sp.MatrixSymbol(BEFORE, DIM, 1), sp.MatrixSymbol(VALUE, DIM, 1)
    score = sp.Symbol("s_i", real=True)
    result = a_before + (score * v - a_before) / (TOKEN + 1)
    in_entries = {v[ENTRY, 0]: value, a_before[ENTRY, 0]: was, score: SCORES[TOKEN]}
    rewritten(found, result[ENTRY, 0].xreplace(in_entries))

    softmax = softmax_recursion()
    rate, _, its_value = softmax.arguments.values()
    as_softmax = rewritten(softmax.result.xreplace({rate: 1 / (TOKEN + 1), its_value: score * v}), result)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {"definition": candidate[ENTRY, 0].xreplace(in_entries).xreplace({was: before}) - now}

    return Derivation(
        name="average_recursion",
        source="This book",
        assumptions=(
            Step(
                "What is read",
                read(TOKEN),
                rf"{NOW} = \frac{{1}}{{i + 1}} \sum_{{j=0}}^{{i}} s_j \boldsymbol{{v}}_j",
                "One head of linear attention takes the mean of the values times their scores. Token 0 is the query, "
                "and $i$ tokens of the context follow; we take any one entry $k$.",
            ),
        ),
        steps=(
            Step(
                "One sum",
                (now, before),
                stacked(
                    r"a_{i-1} = \frac{N}{i}",
                    r"a_i = \frac{N + s_i v_i}{i + 1}",
                    r"N = \sum_{j=0}^{i-1} s_j v_j",
                ),
                "SymPy splits the last term off the sum, for any $i$; this is one entry.",
            ),
            Step(
                "Recursion",
                found,
                r"a_i = a_{i-1} + \frac{s_i v_i - a_{i-1}}{i + 1}",
                "It solves the first equation for $N$ and puts it into the second.",
            ),
            Step(
                "The rate of a mean",
                as_softmax,
                stacked(
                    rf"{NOW} = {BEFORE} + \alpha_i\, (s_i {VALUE} - {BEFORE})",
                    r"\alpha_i = \frac{1}{i + 1}",
                ),
                "This is the recursion of softmax attention with uniform weights, for the value times its score; here "
                "the scores decide where to go, and not how far.",
            ),
        ),
        result=result,
        latex=AVERAGE_FORMULA,
        arguments={"i": TOKEN, "score": score, "a_before": a_before, "v": v},
        shapes={"i": "", "score": "", "a_before": "dim", "v": "dim", "return": "dim"},
        must_vanish=must_vanish,
    )
