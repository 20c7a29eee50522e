r"""A context that is taken into the weights from the left: what one more token adds."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded
from icl_lib.symbolic.derivation import Asked, Derivation, Given, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, latex, matrix, rank_one, vector
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 1, appendix B; version 4, Proposition 2.6 and Corollary C.3"


@cache
def eaten_from_left() -> Derivation:
    r"""Derive the edit that takes one more token from the left, for any number of tokens.

    $$P_i = P_{i-1} + \frac{P_{i-1} (r_{i-1} - r_i)\, r_i^\top}{\|r_i\|^2}, \qquad P_0 = W, \qquad
    P_i\, r_i = W a_C$$

    $r_i = A(c_{i+1} \dots c_n, x)$ is read when the first $i$ tokens are gone, so $r_0 = a_C$ and $r_n = a_0$. The
    theorem is applied to the weights $P_{i-1}$. If $P_{i-1}\, r_{i-1} = W a_C$, then $P_i\, r_i = W a_C$: this is the
    induction step. Every step adds a column times a row of its own, so the rank of $P_i - W$ grows by at most one a
    token.

    Source: Dherin et al. (arXiv 2507.16003), version 1, appendix B; version 4, Proposition 2.6, and Corollary C.3 for
    the product; that it is Kaczmarz's step (Kaczmarz 1937), always with the same target: this book.

    Shapes: the result, $P_i$, is a function of ``P`` ``[out, in]``, which is $P_{i-1}$, ``r_before`` ``[in]``, which is
    $r_{i-1}$, and ``r_now`` ``[in]``, which is $r_i$.

    >>> import numpy as np
    >>> derivation = eaten_from_left()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([3.0, 1.0]), np.array([1.0, 1.0])) @ np.array([1.0, 1.0])
    array([3., 1.])
    """
    least = weight_update()
    W, a_0, a_C = least.arguments.values()
    P, P_now = matrix("P_{i-1}"), matrix("P_i")
    before, now = vector("r", index="i-1"), vector("r", index="i")
    theorem = least.result.xreplace({W: P, a_0: now, a_C: before})
    edited = rewritten(expanded(P + theorem), P + rank_one(P * (before - now), now))
    factor = sp.Identity(IN) + rank_one(before - now, now)
    kaczmarz = P - rank_one(P * now - W * a_C, now)

    return Derivation(
        name="eaten_from_left",
        source=SOURCE,
        assumptions=dict(
            so_far=Step(
                "**So far.** The weights $P_{i-1}$ have taken up the first $i - 1$ tokens: they map "
                f"${latex(before)}$, which is read without these tokens, to what $W$ computes from ${latex(a_C)}$. At "
                f"the start $P_0$ is $W$ and $\\boldsymbol{{r}}_0$ is ${latex(a_C)}$.",
                Given(P * before, W * a_C),
            ),
            nonzero=Step(
                "**Nonzero activation.** The theorem is applied once for every token and needs this every time.",
                Nonzero(now),
            ),
        ),
        steps=dict(
            one_more=Step(
                f"**Take one more token.** This is `weight_update` for the weights $P_{{i-1}}$, with ${latex(before)}$ "
                f"for ${latex(a_C)}$ and ${latex(now)}$ for ${latex(a_0)}$.",
                Asked(P_now, edited),
            ),
            same_output=Step(
                "**Same pre-activation.** We multiply out. By induction this holds after every token.",
                Asked(P_now * now, P * before, W * a_C),
            ),
            one_target=Step(
                "**One target.** So the step is a full step of Kaczmarz's method: after it the weights map "
                f"${latex(now)}$ to ${latex(W * a_C)}$. The target is the same for every token.",
                Asked(P_now, kaczmarz),
            ),
            product=Step(
                "**A product.** Every token multiplies the weights by such a factor from the right.",
                Asked(P_now, P * factor),
            ),
            rank=Step(
                f"**Rank.** The step is a column times the row ${latex(now.T)}$, which differs from token to token. So "
                "the rank of $P_i - W$ grows by at most one a token. The edit that replaces the context at once has "
                "rank one.",
                Asked(P_now - P, rank_one(P * (before - now), now)),
            ),
        ),
        unknown=P_now,
        result=edited,
        statement=Asked(P_now, P + rank_one(P * (before - now), now)),
        arguments={"P": P, "r_before": before, "r_now": now},
    )
