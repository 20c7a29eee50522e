r"""Why no other edit with the same pre-activation is as small as the weight update."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Given, Identity, Step
from icl_lib.symbolic.notation import OUT, dot, latex, matrix, number, squared_norm
from icl_lib.symbolic.solution_set import solution_set
from icl_lib.symbolic.weight_update import weight_update


@cache
def uniqueness() -> Derivation:
    r"""Derive that the weight update is the only least edit: Pythagoras, for edits.

    $$\|\Delta W + N\|_F^2 = \|\Delta W\|_F^2 + \|N\|_F^2 \qquad \text{for every } N \text{ with } N a_0 = 0$$

    Source: Dherin et al. (arXiv 2507.16003), version 4, Theorem 2.3.

    Shapes: the result is a number, the squared norm of the solution that :func:`~icl_lib.symbolic.solution_set` gives
    for $M$: a function of ``W`` ``[out, in]``, ``a_without`` ``[in]``, ``a_with`` ``[in]`` and ``M`` ``[out, in]``.

    >>> import numpy as np
    >>> derivation = uniqueness()
    >>> derivation.check()
    True
    >>> W, a0, aC, M = np.ones((1, 2)), np.array([1.0, 0.0]), np.array([3.0, 4.0]), np.array([[5.0, 7.0]])
    >>> float(derivation.lambdify()(W, a0, aC, M))  # 6² + 7²
    85.0
    """
    least, solutions = weight_update(), solution_set()
    W, a_0, a_C, _ = solutions.arguments.values()
    edit, N = least.unknown, matrix("N")
    [(multipliers, found)] = least.solution.items()
    outer_product, rest = multipliers * a_0.T, solutions.names[N]
    together = number(rf"\|{latex(edit + N)}\|_F^2")

    return Derivation(
        name="uniqueness",
        source="Dherin et al. 2025 (arXiv 2507.16003), version 4, Theorem 2.3",
        assumptions=dict(
            another=Step(
                "**Another solution.** Every other solution is $\\Delta W + N$, where $N$ is not zero and satisfies "
                "this (`solution_set`).",
                Given(N * a_0, sp.ZeroMatrix(OUT, 1)),
            ),
            nonzero=least.step("nonzero"),
        ),
        steps=dict(
            column_times_row=Step(
                "**A column times a row.** The weight update has this form (`weight_update`).",
                Identity(edit, outer_product),
                Identity(multipliers, W * (a_C - a_0) / squared_norm(a_0)),
            ),
            expansion=Step(
                "**Expansion.** The squared norm of a sum has a cross term.",
                Identity(together, squared_norm(edit) + 2 * dot(edit, N) + squared_norm(N)),
            ),
            cross_term=Step(
                "**Cross term.** A trace is unchanged by cyclic permutation of its factors, so the factor "
                f"${latex(N * a_0)}$ appears, which is zero.",
                Identity(dot(edit, N), dot(multipliers, N * a_0), sp.S.Zero),
            ),
            smaller=Step(
                "**Every other solution is larger.** The squared norm of $N$ is a sum of squares. It is positive "
                "unless $N$ is zero.",
                Identity(together - squared_norm(edit), squared_norm(N)),
            ),
        ),
        unknown=together,
        result=squared_norm(least.result) + squared_norm(rest),
        statement=Asked(together, squared_norm(edit) + squared_norm(N)),
        arguments=solutions.arguments,
        names={edit: outer_product, multipliers: found, together: squared_norm(edit + N)},
        solution={N: rest},
        beyond=lambda candidate: (Identity(candidate, squared_norm(solutions.result)),),
    )
