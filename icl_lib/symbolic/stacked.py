r"""The updates of one block at many positions share their right factor, so their sum has rank one as well."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.every_position import SOURCE, WEIGHT_FORMULA, position_weight_update
from icl_lib.symbolic.least_norm import two_by_two_minors
from icl_lib.symbolic.notation import checked_sizes, matrix, put, squared_norm, stacked, vector
from icl_lib.symbolic.residual_block import READ, READ_ALONE

U = r"\boldsymbol{u}"
SUM_FORMULA = (
    rf"\sum_i \Delta W_i = \frac{{W \sum_i ({READ} - {READ_ALONE})\, {READ_ALONE}^{{\top}}}}{{\|{READ_ALONE}\|^2}}"
)


@lru_cache(maxsize=None, typed=True)
def shared_factor(out_features: int, in_features: int, positions: int) -> Derivation:
    r"""Derive that the weight updates of all positions have one factor in common, so that their sum has rank one too.

    $$\begin{pmatrix} \Delta W_1 \\ \vdots \\ \Delta W_n \end{pmatrix}
    = \begin{pmatrix} u_1 \\ \vdots \\ u_n \end{pmatrix} \frac{f^\top}{\|f\|^2}, \qquad
    \sum_i \Delta W_i = \frac{W \sum_i (g_i - f)\, f^\top}{\|f\|^2}, \qquad u_i = W (g_i - f)$$

    The right factor $f$ is what the MLP reads from the query alone, which no position changes.

    Source: Innocenti and Achour, Theorem 1; they find the rank of the sum in their experiments.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, the sum, is a function of ``W`` ``[out, in]``, ``f``
    ``[in]`` and ``g`` ``[positions, in]``, whose row $i$ is $g_i$.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = shared_factor(2, 2, 3)
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([[3.0, 1.0], [1.0, 2.0], [1.0, 1.0]]))
    array([[1. , 1. ],
           [0.5, 0.5]])
    """
    checked_sizes(positions=positions)
    single = position_weight_update(out_features, in_features)
    W, f, g_i = (single.arguments[name] for name in ("W", "f", "g_i"))
    g = matrix("g", positions, in_features)
    updates = [put(single.result, (g_i, g.row(i).T)) for i in range(positions)]
    stack = sp.ImmutableMatrix.vstack(*updates)
    differences = [g.row(i).T - f for i in range(positions)]

    # A minor that vanishes whatever numbers stand in the column vanishes for this column.
    column = vector("u", out_features * positions)
    left = sp.ImmutableMatrix.vstack(*(W * difference for difference in differences))
    factored = rewritten(stack, left * f.T / squared_norm(f))
    outer_product = column * f.T / squared_norm(f)
    minors = two_by_two_minors(outer_product)

    adding = sp.ImmutableMatrix.hstack(*[sp.eye(out_features)] * positions)
    total = rewritten(adding * factored, W * sum(differences[1:], differences[0]) * f.T / squared_norm(f))

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "sum": candidate - sum(updates[1:], updates[0]),
            "rank one": sp.ImmutableMatrix(two_by_two_minors(candidate)),
        }

    return Derivation(
        name="shared_factor",
        source=f"{SOURCE}; the rank of the sum is seen in their experiments",
        assumptions=(
            Step(
                "Position update",
                single.result,
                WEIGHT_FORMULA,
                "At every position the block has its weight update: this is `position_weight_update`.",
            ),
            Step(
                "Stack",
                stack,
                r"S = \begin{pmatrix} \Delta W_1 \\ \vdots \\ \Delta W_{" + str(positions) + r"} \end{pmatrix}",
                "We set the updates of all positions one below the other.",
            ),
            single.step("Something to read"),
        ),
        steps=(
            Step(
                "Shared factor",
                factored,
                stacked(
                    rf"S = \begin{{pmatrix}} {U}_1 \\ \vdots \\ {U}_{{{positions}}} \end{{pmatrix}}"
                    rf" \frac{{{READ_ALONE}^{{\top}}}}{{\|{READ_ALONE}\|^2}}",
                    rf"{U}_i = W ({READ} - {READ_ALONE})",
                ),
                f"Every update has the same row, ${READ_ALONE}^{{\\top}} / \\|{READ_ALONE}\\|^2$, so the stack is one "
                "column times this row.",
            ),
            Step(
                "Rank one",
                sp.ImmutableMatrix(minors),
                r"\operatorname{rank} S \le 1",
                f"The rank is at most one when every $2 \\times 2$ minor is zero: all {len(minors)} of them are, "
                "whatever the column is."
                if minors
                else "With a single row or a single column, the rank cannot be more than one.",
            ),
            Step(
                "Adding up",
                adding,
                r"\sum_i \Delta W_i = (I \;\cdots\; I)\, S",
                "The sum of the updates is a product with the stack, and a product has no higher rank than either of "
                "its factors.",
            ),
            Step(
                "Sum",
                total,
                SUM_FORMULA,
                "So the sum has rank at most one, however many positions there are: all of their tokens are in its "
                "left factor.",
            ),
        ),
        result=total,
        latex=SUM_FORMULA,
        arguments={"W": W, "f": f, "g": g},
        shapes={"W": "out in", "f": "in", "g": "positions in", "return": "out in"},
        must_vanish=must_vanish,
    )
