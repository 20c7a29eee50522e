r"""What the edit made for one query misses at another."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step
from icl_lib.symbolic.notation import OUT, dot, latex, number, squared_norm, vector
from icl_lib.symbolic.weight_update import weight_update


@cache
def transfer_error() -> Derivation:
    r"""Derive what the weight update of one query misses at another query.

    $$\boldsymbol u = W \Bigl( (a_C' - a_0') - \frac{a_0^\top a_0'}{\lVert a_0 \rVert^2} (a_C - a_0) \Bigr)$$

    $a_0$ and $a_C$ belong to the query that the edit was made for, $a_0'$ and $a_C'$ to the other one.

    Source: this book.

    Shapes: the result, $u$, is a function of ``W`` ``[out, in]`` and the vectors ``a_without``, ``a_with``,
    ``other_without`` and ``other_with`` ``[in]``.

    >>> import numpy as np
    >>> derivation = transfer_error()
    >>> derivation.check()
    True
    >>> a_0, a_C = np.array([1.0, 0.0]), np.array([1.0, 1.0])
    >>> derivation.lambdify()(np.eye(2), a_0, a_C, -a_0, a_C)
    array([2., 2.])
    """
    W, a_0, a_C = weight_update().arguments.values()
    other_0, other_C = (vector("a", index=index, upper=r"\prime") for index in "0C")
    missed, own = vector("u", OUT), vector("u", OUT, index="0")
    edit = sp.MatrixSymbol(r"\Delta W", *W.shape)
    change, others = a_C - a_0, other_C - other_0
    along, share = number(r"\beta"), dot(a_0, other_0) / squared_norm(a_0)
    result = W * (others - share * change)

    return Derivation(
        name="transfer_error",
        source="This book",
        assumptions=dict(
            edit=Step(
                "**The edit.** It is the one of `weight_update`, made for one query.",
                Nonzero(a_0),
                Identity(edit, weight_update().result),
            ),
            missed=Step(
                "**Another query.** The edited map reads it without the context. What is missed is the difference to "
                "what the map returns with the context.",
                Asked(missed, W * other_C - (W + edit) * other_0),
            ),
        ),
        steps=dict(
            along=Step(
                f"**The part along.** The edit sees only the part of ${latex(other_0)}$ along ${latex(a_0)}$.",
                Identity(along, share),
                Identity(edit * other_0, along * (W * change)),
            ),
            difference=Step(
                "**Two changes.** The change that the context makes at the other query stands against the one "
                "that the edit carries over.",
                Asked(missed, W * others - along * (W * change)),
                Asked(missed, W * (others - along * change)),
            ),
            itself=Step(
                "**The same query.** At the query that the edit was made for, nothing is missed.",
                Identity(own, W * a_C - (W + edit) * a_0),
                Identity(own, sp.ZeroMatrix(OUT, 1)),
            ),
        ),
        unknown=missed,
        result=result,
        statement=Asked(missed, W * (others - along * change)),
        arguments={"W": W, "a_without": a_0, "a_with": a_C, "other_without": other_0, "other_with": other_C},
        names={along: share, edit: weight_update().result, own: result.xreplace({other_0: a_0, other_C: a_C})},
    )
