r"""The updates of one block at all positions share their right factor, so their sum has rank one as well."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, total
from icl_lib.symbolic.notation import OUT, latex, rank_one, squared_norm, vector
from icl_lib.symbolic.position_weight_update import SOURCE, position_weight_update

POSITIONS = 3
"""The sums over positions are proved for three; the induction step covers any number."""


@cache
def shared_factor() -> Derivation:
    r"""Derive that the weight updates of all positions have one factor in common, so that their sum has rank one too.

    $$\Delta W_i = \frac{u_i f^\top}{\|f\|^2}, \qquad
    \sum_i \Delta W_i = \frac{\bigl(\sum_i u_i\bigr)\, f^\top}{\|f\|^2}, \qquad u_i = W (g_i - f)$$

    The right factor $f$ is what the MLP reads from the query alone, which no position changes.

    Source: Innocenti and Achour (arXiv 2512.11255), version 1, Theorem 1; they find the rank of the sum in their
    experiments.

    Shapes: the result, the sum for three positions, is a function of ``W`` ``[out, in]``, ``f`` ``[in]`` and ``g``
    ``[3, in]``, whose row $i$ is $g_i$.

    >>> import numpy as np
    >>> derivation = shared_factor()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
    array([[1. , 1. ],
           [0.5, 0.5]])
    """
    single = position_weight_update()
    W, f, g_i = single.arguments.values()
    update, u_i = single.unknown, vector("u", OUT, "i")
    left, one_more = (vector(letter, OUT) for letter in "pq")
    g = tuple(vector("g", index=str(k + 1)) for k in range(POSITIONS))
    instances = tuple({update: single.result.xreplace({g_i: read}), u_i: W * (read - f)} for read in g)

    sum_of_updates, added = total(r"\sum_i", update, instances)
    sum_of_columns, columns = total(r"\sum_i", u_i, instances)
    result = sp.MatMul(columns, f.T) / squared_norm(f)

    return Derivation(
        name="shared_factor",
        source=f"{SOURCE}; the rank of the sum is seen in their experiments",
        assumptions=dict(
            position_update=Step(
                "**Weight update of a position.** At every position the block has its weight update "
                "(`position_weight_update`).",
                Identity(update, single.result),
            ),
            nonzero=single.step("nonzero"),
        ),
        steps=dict(
            shared_factor=Step(
                f"**Shared factor.** Only the column ${latex(u_i)}$ depends on the position. The row does not.",
                Identity(update, rank_one(u_i, f)),
                Identity(u_i, W * (g_i - f)),
            ),
            induction=Step(
                f"**Adding one more.** Two columns times the row ${latex(f.T)}$ add up to one column times this row. "
                "So the sum has rank at most one for any number of positions.",
                Identity(left * f.T + one_more * f.T, (left + one_more) * f.T),
            ),
            sum=Step(
                "**Sum.** All tokens are in the left factor.", Identity(sum_of_updates, rank_one(sum_of_columns, f))
            ),
        ),
        unknown=sum_of_updates,
        result=result,
        statement=Asked(sum_of_updates, rank_one(sum_of_columns, f)),
        arguments={"W": W, "f": f, "g": g},
        names={update: single.result, u_i: W * (g_i - f), sum_of_updates: added, sum_of_columns: columns},
        beyond=lambda candidate: (Identity(candidate, added),),
    )
