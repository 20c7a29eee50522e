r"""Attention outputs an average, so one more token moves it a part of the way to the token's own value."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import WIDTH, latex, number, vector

RATE = sp.Symbol(r"\alpha_i", positive=True)
BEFORE, NOW, VALUE = vector("a", WIDTH, "i-1"), vector("a", WIDTH, "i"), vector("v", WIDTH, "i")
SUM, SUM_NOW = vector("w", WIDTH, "i-1"), vector("w", WIDTH, "i")
TOTAL, TOTAL_NOW = sp.Symbol(r"Z_{i-1}", positive=True), sp.Symbol("Z_i", positive=True)
OTHER, OTHER_BEFORE = (sp.Symbol(rf"\alpha_j^{{({k})}}", positive=True) for k in ("i", "i-1"))
SCORE = number("s_i")
NAMES = {
    TOTAL_NOW: TOTAL + sp.exp(SCORE),
    SUM_NOW: SUM + sp.exp(SCORE) * VALUE,
    BEFORE: SUM / TOTAL,
    NOW: SUM_NOW / TOTAL_NOW,
    RATE: sp.exp(SCORE) / TOTAL_NOW,
    OTHER: sp.exp(number("s_j")) / TOTAL_NOW,
    OTHER_BEFORE: sp.exp(number("s_j")) / TOTAL,
}


@cache
def running_average() -> Derivation:
    r"""Derive how an attention head goes from $i - 1$ tokens to $i$: towards the new value, by its attention weight.

    $$a_i = a_{i-1} + \alpha_i\, (v_i - a_{i-1}), \qquad \alpha_i = \frac{e^{s_i}}{\sum_{j=0}^{i} e^{s_j}}$$

    This is one head. The query counts as token 0, with the score $s_0$ and the value $v_0 = W_O W_V x$; the values of
    the other tokens are $v_j = W_O W_V c_j$. $a_i$ is the average of the values of tokens 0 to $i$. A new token must
    leave the scores $s_j$ and the values of the others as they were. That fails if it shifts their positions, and in
    later blocks, where the query's stream changes with each token.

    Linear attention that is divided by the number of tokens is the same with $s_i v_i$ for the value and
    $\alpha_i = 1/(i + 1)$. Mean pooling has $s_i = 1$.

    Source: this book; softmax attention: Vaswani et al. 2017 (arXiv 1706.03762), equation 1. The recursion extends the
    online normaliser of Milakov and Gimelshein 2018 (arXiv 1805.02867) to the values; FlashAttention (Dao et al. 2022,
    arXiv 2205.14135) uses the same rescaling.

    Shapes: the result, $a_i$, is a function of ``alpha`` ``[]``, which is $\alpha_i$, ``a_before`` ``[dim]`` and ``v``
    ``[dim]``, of any size.

    >>> import numpy as np
    >>> derivation = running_average()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array(0.25), np.array([4.0, 0.0]), np.array([0.0, 8.0]))
    array([3., 2.])
    """
    result = BEFORE + RATE * (VALUE - BEFORE)
    told, names = _equal_rates(result)

    return Derivation(
        name="running_average",
        source="This book; the online normaliser of softmax: Milakov and Gimelshein 2018 (arXiv 1805.02867); the same "
        "rescaling of values: Dao et al. 2022 (arXiv 2205.14135)",
        assumptions=dict(
            sums=Step(
                f"**Two sums.** $Z_i$ adds up $e^{{s_j}}$ and ${latex(SUM_NOW)}$ adds up $e^{{s_j}} "
                "\\boldsymbol{v}_j$ over the query, which counts as token 0, and the first $i$ tokens. A new token "
                "adds one term to each and changes no other.",
                Identity(TOTAL_NOW, NAMES[TOTAL_NOW]),
                Identity(SUM_NOW, NAMES[SUM_NOW]),
            ),
            average=Step(
                "**Softmax attention.** The output of the head is the average of the values with the attention "
                "weights.",
                Identity(NOW, NAMES[NOW]),
                Identity(RATE, NAMES[RATE]),
            ),
            nonzero=Step("**Something to average.** There is at least the query.", Nonzero(TOTAL)),
        ),
        steps=dict(
            others=Step(
                "**The others lose.** The attention weight of every other token is multiplied by $1 - \\alpha_i$.",
                Identity(OTHER, (1 - RATE) * OTHER_BEFORE),
            ),
            recursion=Step(
                "**Recursion.** So the old average is multiplied by it as well, and the new value is added with its "
                "own weight.",
                Identity(NOW, (1 - RATE) * BEFORE + RATE * VALUE),
                Identity(NOW, result),
            ),
            **told,
        ),
        unknown=NOW,
        result=result,
        statement=Identity(NOW, result),
        arguments={"alpha": RATE, "a_before": BEFORE, "v": VALUE},
        names={**NAMES, **names},
        beyond=lambda candidate: (Identity(candidate, NOW),),
    )


def _equal_rates(result: Any) -> tuple[dict[str, Step], dict[Any, Any]]:
    """Return the steps about averages whose rate does not depend on the scores, and the names in them."""
    count, same = sp.Symbol("i", positive=True), number("s")
    plain, plain_now = vector("m", WIDTH, "i-1"), vector("m", WIDTH, "i")
    mean = (count * plain + SCORE * VALUE) / (count + 1)
    rewritten(mean, result.xreplace({BEFORE: plain, VALUE: SCORE * VALUE, RATE: 1 / (count + 1)}))
    steps = dict(
        equal_scores=Step(
            "**Equal scores.** If all scores are equal, the rate is that of a plain mean of $i + 1$ values. Then "
            "$Z_{i-1}$ is $i\\, e^s$.",
            Identity(sp.exp(same) / (count * sp.exp(same) + sp.exp(same)), 1 / (count + 1)),
        ),
        plain_mean=Step(
            "**Linear attention and mean pooling.** A mean of $s_j \\boldsymbol{v}_j$ has this rate whatever the "
            "scores are. The scores set the target, not the fraction of the way to it.",
            Identity(plain_now, plain + (SCORE * VALUE - plain) / (count + 1)),
        ),
    )
    return steps, {plain_now: mean}
