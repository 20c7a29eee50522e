r"""All edits that reproduce the pre-activation with the context."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded
from icl_lib.symbolic.derivation import Asked, Derivation, Given, Identity, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, latex, matrix, perpendicular_to
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 4, Theorem 2.3, gives the least; all solutions: this book"


@cache
def solution_set() -> Derivation:
    r"""Derive all weight edits that reproduce the pre-activation with the context.

    $$X = \Delta W + M \left(I - \frac{a_0 a_0^\top}{\|a_0\|^2}\right), \qquad M \text{ any matrix}$$

    Each of these satisfies the constraint, and each edit $X$ that satisfies it is one of these, with
    $M = X - \Delta W$.

    Source: this book; the least of them is that of Dherin et al. (arXiv 2507.16003), version 4, Theorem 2.3.

    Shapes: the result, $X$, is a function of ``W`` ``[out, in]``, ``a_without`` ``[in]``, ``a_with`` ``[in]`` and
    ``M`` ``[out, in]``, of any sizes.

    >>> import numpy as np
    >>> derivation = solution_set()
    >>> derivation.check()
    True
    >>> W, a0, aC, M = np.ones((1, 2)), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.array([[5.0, 7.0]])
    >>> derivation.lambdify()(W, a0, aC, M)
    array([[6., 7.]])
    """
    least = weight_update()
    W, a_0, a_C = least.arguments.values()
    edit, M, N, X, other = least.unknown, matrix("M"), matrix("N"), matrix("X"), matrix("X'")
    projector = perpendicular_to(a_0)

    # With a_C = 0, the weight update of M is the least edit with which M maps a_0 to zero.
    to_zero = M + least.result.xreplace({W: M, a_C: sp.ZeroMatrix(IN, 1)})
    rest = rewritten(expanded(to_zero), M * projector)
    every = least.result + rest
    any_other = Given(other * a_0, W * (a_C - a_0))

    return Derivation(
        name="solution_set",
        source=SOURCE,
        assumptions=dict(
            effect=Step(
                "**Same pre-activation.** We look for every edit $X$ that reproduces the pre-activation, large or "
                "small.",
                Asked((W + X) * a_0, W * a_C),
            ),
            nonzero=least.step("nonzero"),
            another=Step(
                f"**Any solution.** Let ${latex(other)}$ be any edit that reproduces the pre-activation. Nothing else "
                "is assumed of it.",
                any_other,
            ),
        ),
        steps=dict(
            one_solution=Step(
                "**One solution.** The weight update, derived before, is one of them.", Identity(edit, least.result)
            ),
            no_effect=Step(
                f"**Edits without effect.** Take any matrix $M$. The smallest edit after which $M$ maps ${latex(a_0)}$ "
                f"to zero is again a weight update, with $M$ in place of $W$ and zero in place of ${latex(a_C)}$. "
                "Added to $M$ it gives $N$.",
                Identity(N, rest),
                Identity(N * a_0, sp.ZeroMatrix(OUT, 1)),
            ),
            each_is_one=Step("**Each sum is a solution.** We multiply out.", Identity((W + edit + N) * a_0, W * a_C)),
            none_is_missing=Step(
                f"**None is missing.** Both edits reproduce the pre-activation, so ${latex(other - edit)}$ maps "
                f"${latex(a_0)}$ to zero. Hence with $M = {latex(other - edit)}$ the formula returns ${latex(other)}$: "
                "every solution has this form.",
                Identity(edit + (other - edit) * projector, other),
            ),
        ),
        unknown=X,
        result=every,
        statement=Asked(X, edit + M * projector),
        arguments={**least.arguments, "M": M},
        names={edit: least.result, N: rest},
        beyond=lambda candidate: (Identity(candidate.xreplace({M: other - edit}), other),),
    )
