r"""For linear attention, one edit of the weights replaces the prompt for every query."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, QUERIES, latex, matrix, rank_one, vector
from icl_lib.symbolic.weight_update import weight_update

CONTEXT, MATRIX = matrix("C", IN, QUERIES), matrix("S_C", IN, IN)
KEY, QUERY, VALUE, OUTPUT = (matrix(name, IN, IN) for name in ("W_K", "W_Q", "W_V", "P"))
ASKED, READ = vector("q"), vector("a", index="C")


@cache
def query_independent_update() -> Derivation:
    r"""Derive the edit that replaces a context for every query, where attention is linear.

    $$\Delta W = W S_C, \qquad S_C = P\, W_V C C^\top W_K^\top W_Q$$

    The tokens of the context are the columns of $C$. The query token $q$ reads $q + S_C\, q$, and $q$ alone without a
    context. For one query, the edit of least norm is the part of $W S_C$ that acts on this query.

    Source: Dherin et al. (arXiv 2507.16003), version 4, Example 2.5; Chen et al. 2024 (arXiv 2406.02847).

    Shapes: the result, $\Delta W$, is a function of ``W`` ``[out, in]``, ``C`` ``[in, tokens]`` and ``W_K``, ``W_Q``,
    ``W_V`` and ``P``, all ``[in, in]``.

    >>> import numpy as np
    >>> derivation = query_independent_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(*(np.full((1, 1), number) for number in (2.0, 3.0, 1.0, 1.0, 1.0, 0.5)))
    array([[9.]])
    """
    W, a_0, a_C = weight_update().arguments.values()
    edit = matrix(r"\Delta W")
    written = OUTPUT * (VALUE * CONTEXT) * (KEY * CONTEXT).T * QUERY
    read = ASKED + MATRIX * ASKED
    found = rewritten(solved(expanded(W + edit - W * (sp.Identity(IN) + MATRIX)), edit), W * MATRIX)
    of_one = weight_update().result.xreplace({a_0: ASKED, a_C: READ})

    return Derivation(
        name="query_independent_update",
        source="Dherin et al. 2025 (arXiv 2507.16003), version 4, Example 2.5; Chen et al. 2024 (arXiv 2406.02847)",
        assumptions=dict(
            attention=Step(
                f"**Linear attention.** The query enters once. The columns of ${latex(CONTEXT)}$ are the tokens of the "
                "context, and without one the layer returns the query.",
                Identity(READ, read),
                Identity(MATRIX, written),
            ),
            effect=Step(
                "**Same pre-activation.** For every query, the edited map returns without the context what the map "
                "returns with it.",
                Asked((W + edit) * ASKED, W * READ),
            ),
        ),
        steps=dict(
            every_query=Step(
                "**Every query.** Two maps that agree on every vector are the same matrix.",
                Asked(W + edit, W * (sp.Identity(IN) + MATRIX)),
            ),
            solve=Step("**Solve for the edit.** It does not contain the query.", Asked(edit, found)),
            one_query=Step(
                "**One query.** The edit of `weight_update` is the part of it that acts on this query.",
                Nonzero(ASKED),
                Asked(of_one, edit * rank_one(ASKED, ASKED)),
            ),
        ),
        unknown=edit,
        result=W * written,
        statement=Asked(edit, found),
        arguments={"W": W, "C": CONTEXT, "W_K": KEY, "W_Q": QUERY, "W_V": VALUE, "P": OUTPUT},
        shapes={
            "W": "out in",
            "C": "in tokens",
            **dict.fromkeys(("W_K", "W_Q", "W_V", "P"), "in in"),
            "return": "out in",
        },
        names={READ: read, MATRIX: written},
    )
