r"""A whole context eaten from the left: each token's edit is made to the weights that have eaten those before it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.eating import NEXT, NOW, SOURCE, STEP_FORMULA, eating_step, something_to_read
from icl_lib.symbolic.least_norm import two_by_two_minors, weight_update
from icl_lib.symbolic.notation import A_WITH, A_WITHOUT, checked_sizes, matrix, put, squared_norm, stacked, vector


@lru_cache(maxsize=None, typed=True)
def eaten_from_left(out_features: int, in_features: int, tokens: int) -> Derivation:
    r"""Derive the weights that have eaten a whole context from the left, and that each token adds at most one rank.

    $$P_0 = W, \qquad P_{i+1} = P_i + \frac{P_i (s_i - s_{i+1})\, s_{i+1}^\top}{\|s_{i+1}\|^2}, \qquad
    P_i\, s_i = W a_C, \qquad \operatorname{rank}(P_i - W) \le i$$

    $s_i = A(c_{i+1} \dots c_n, x)$ is read once the first $i$ tokens are eaten, so $s_0 = a_C$ and $s_n = a_0$. The
    theorem is applied again and again, with a number of tokens that is given; :func:`~icl_lib.symbolic.eating_step` is
    the step for any number.

    Source: Dherin et al., appendix B.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $P_n$ for $n$ = ``tokens``, is a function of ``W``
    ``[out, in]`` and ``s`` ``[tokens+1, in]``, whose first row is $s_0$.

    Raises `ValueError` for a size that is not a whole number of at least 1. SymPy takes seconds for three tokens.

    >>> import numpy as np
    >>> derivation = eaten_from_left(2, 2, 2)
    >>> derivation.check()
    True
    >>> s = np.array([[3.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> derivation.lambdify()(np.eye(2), s) @ s[2]  # the answer to s[0]
    array([3., 1.])
    """
    checked_sizes(tokens=tokens)
    least = weight_update(out_features, in_features)
    W, a0, aC = (least.arguments[name] for name in ("W", "a_without", "a_with"))
    s = matrix("s", tokens + 1, in_features)
    reads = [s.row(i).T for i in range(tokens + 1)]

    P, answers, columns = [W], [], []
    for now, after in pairwise(reads):
        columns.append(P[-1] * (now - after) / squared_norm(after))
        edit = put(least.result, (W, P[-1]), (a0, after), (aC, now))
        P.append(P[-1] + rewritten(edit, columns[-1] * after.T))
        answers.append(rewritten(P[-1] * after, W * reads[0]))

    # A minor that vanishes whatever numbers stand in the column and the row vanishes for these.
    minors = two_by_two_minors(vector("u", out_features) * vector("s", in_features).T)
    left, right = (sp.ImmutableMatrix.hstack(*factors) for factors in (columns, reads[1:]))
    low_rank = rewritten(P[-1] - W, left * right.T)

    last_edit = matrix("E", out_features, in_features)
    asked = least.must_vanish(last_edit)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        values = (W, P[-2]), (a0, reads[-1]), (aC, reads[-2]), (last_edit, candidate - P[-2])
        return {
            "answer": candidate * reads[-1] - W * reads[0],
            **{f"{name} of the last edit": put(asked[name], *values) for name in ("effect", "stationarity")},
        }

    eating = eating_step()
    return Derivation(
        name="eaten_from_left",
        source=SOURCE,
        assumptions=(
            eating.step("What is read"),
            Step("Weights", W, r"P_0 = W", "Nothing has been eaten yet, and the weights are those of the block."),
            Step(
                "Eat one more",
                eating.result,
                stacked(*STEP_FORMULA),
                "The theorem is applied to the weights that have eaten the tokens before: this is `eating_step`.",
            ),
            something_to_read(tuple(sp.Ne(squared_norm(read), 0) for read in reads[1:])),
        ),
        steps=(
            *(
                Step(
                    f"Token {i}",
                    answer,
                    rf"P_{{{i}}} \boldsymbol{{s}}_{{{i}}} = W \boldsymbol{{s}}_0 = W {A_WITH}",
                    _after_token(i, tokens),
                )
                for i, answer in enumerate(answers, start=1)
            ),
            Step(
                "Rank one a token",
                sp.ImmutableMatrix(minors),
                r"\operatorname{rank}(P_{i+1} - P_i) \le 1",
                f"Each step is a column times the row ${NEXT}^{{\\top}}$, and "
                + (
                    "SymPy finds every $2 \\times 2$ minor of such a product zero."
                    if minors
                    else "with a single row or a single column, the rank cannot be more than one."
                ),
            ),
            Step(
                "Rank of the whole",
                low_rank,
                stacked(
                    rf"P_{{{tokens}}} - W = \sum_i \boldsymbol{{u}}_i\, {NEXT}^{{\top}}",
                    rf"\boldsymbol{{u}}_i = \frac{{P_i ({NOW} - {NEXT})}}{{\|{NEXT}\|^2}}",
                ),
                "The sum is a product of two matrices that have a column for each token, so the rank grows by at most "
                "one a token. The rows are what was read on the way; in general they point in different directions, "
                "while the edit that replaces the whole context at once has rank one.",
            ),
        ),
        result=P[-1],
        latex=stacked(*STEP_FORMULA, rf"P_{{{tokens}}} {A_WITHOUT} = W {A_WITH}"),
        arguments={"W": W, "s": s},
        shapes={"W": "out in", "s": "tokens+1 in", "return": "out in"},
        must_vanish=must_vanish,
    )


def _after_token(i: int, tokens: int) -> str:
    if i == tokens:
        return "The whole context is gone, and the weights answer to the query alone as they did to everything."
    return "SymPy puts the step before into this one and multiplies out: the answer is still that to the whole context."
