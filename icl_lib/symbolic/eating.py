r"""A context that is eaten from the left: what eating one more token does to the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.any_size import IN, OUT, contracted, weight_update_any_size
from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.notation import A_WITH, A_WITHOUT, stacked

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), appendix B"
NOW, NEXT = r"\boldsymbol{s}_i", r"\boldsymbol{s}_{i+1}"
STEP_FORMULA = (
    r"P_{i+1} = P_i",
    rf"{{}} + \frac{{P_i ({NOW} - {NEXT})\, {NEXT}^{{\top}}}}{{\|{NEXT}\|^2}}",
)
KACZMARZ = (
    r"P_{i+1} = P_i",
    rf"{{}} - \frac{{(P_i {NEXT} - W {A_WITH})\, {NEXT}^{{\top}}}}{{\|{NEXT}\|^2}}",
)


@cache
def eating_step() -> Derivation:
    r"""Derive that eating one more token keeps the answer, for matrices of any size.

    $$P_{i+1} = P_i + \frac{P_i (s_i - s_{i+1})\, s_{i+1}^\top}{\|s_{i+1}\|^2} \qquad\Longrightarrow\qquad
    P_{i+1}\, s_{i+1} = P_i\, s_i$$

    $s_i = A(c_{i+1} \dots c_n, x)$ is read once the first $i$ tokens are eaten. To the weights $P_i$, which stand for
    them, the theorem applies again; so if $P_i\, s_i = W a_C$, then $P_{i+1}\, s_{i+1} = W a_C$. This is the induction
    step for any number of tokens.

    Source: Dherin et al., appendix B; that it is Kaczmarz's step (Kaczmarz 1937), and always with the same target: this
    book.

    Shapes: the result, $P_{i+1}$, is a function of ``P`` ``[out, in]``, ``s_now`` ``[in]``, which is $s_i$, and
    ``s_next`` ``[in]``, of any sizes.

    >>> import numpy as np
    >>> derivation = eating_step()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([3.0, 1.0]), np.array([1.0, 1.0])) @ np.array([1.0, 1.0])
    array([3., 1.])
    """
    least = weight_update_any_size()
    W, a0, aC = least.arguments.values()
    P, now, after = sp.MatrixSymbol("P_i", OUT, IN), sp.MatrixSymbol(NOW, IN, 1), sp.MatrixSymbol(NEXT, IN, 1)
    answer = sp.MatrixSymbol(r"\boldsymbol{y}", OUT, 1)
    names = {W: P, a0: after, aC: now}

    edited = P + least.result.xreplace(names)
    answers = rewritten(contracted(edited * after, after), P * now)
    kept = answers.xreplace({P * now: answer})
    kaczmarz = P - (P * after - answer) * after.T / sp.Trace(after.T * after)
    rewritten(kaczmarz.xreplace({answer: P * now}), edited)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        # Exchanging the names, rather than replacing some, also tells apart a candidate that contains W.
        exchanged = candidate.xreplace({**{new: old for old, new in names.items()}, **names})
        return least.must_vanish(exchanged - W)

    return Derivation(
        name="eating_step",
        source=SOURCE,
        assumptions=(
            Step(
                "What is read",
                now,
                stacked(
                    rf"{NOW} = A(c_{{i+1}} \dots c_n, x)",
                    rf"\boldsymbol{{s}}_0 = {A_WITH}, \quad \boldsymbol{{s}}_n = {A_WITHOUT}",
                ),
                f"The tokens are removed one at a time, from the left; ${NOW}$ is read when $i$ of them are gone.",
            ),
            Step(
                "Answer so far",
                sp.Eq(P * now, answer),
                rf"P_i {NOW} = W {A_WITH}",
                f"The weights $P_i$ stand for the first $i$ tokens: they answer to ${NOW}$ as $W$ answered to "
                "everything.",
            ),
            something_to_read(sp.Ne(sp.Trace(after.T * after), 0)),
        ),
        steps=(
            Step(
                "Eat one more",
                edited,
                stacked(*STEP_FORMULA),
                f"We apply the theorem to the weights $P_i$ and remove one token more: this is `weight_update`, with "
                f"${NOW}$ for ${A_WITH}$ and ${NEXT}$ for ${A_WITHOUT}$.",
            ),
            Step(
                "It answers as before",
                answers,
                rf"P_{{i+1}} {NEXT} = P_i {NOW}",
                f"SymPy multiplies out; ${NEXT}^{{\\top}} {NEXT}$ is a number, and it cancels.",
            ),
            Step(
                "Induction",
                kept,
                rf"P_{{i+1}} {NEXT} = W {A_WITH}",
                "So if the answer was that to everything before this token was eaten, it is so after.",
            ),
            Step(
                "One target",
                kaczmarz,
                stacked(*KACZMARZ),
                f"With $W {A_WITH}$ for $P_i {NOW}$ it is the same step: a full step of Kaczmarz's method, after which "
                f"the weights send ${NEXT}$ to the one target $W {A_WITH}$.",
            ),
        ),
        result=edited,
        latex=stacked(*STEP_FORMULA),
        arguments={"P": P, "s_now": now, "s_next": after},
        shapes={"P": "out in", "s_now": "in", "s_next": "in", "return": "out in"},
        must_vanish=must_vanish,
    )


def something_to_read(condition: Any) -> Step:
    """Return what each application of the theorem assumes."""
    return Step(
        "Something to read",
        condition,
        rf"{NEXT} \neq \boldsymbol{{0}}",
        "What is read when a token is gone is not zero: each time the theorem is applied it asks for this.",
    )
