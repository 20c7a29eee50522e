r"""The edit of the MLP's last map that adds a vector to its output."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import OUT, latex, matrix, squared_norm, vector
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "Goldwaser et al. 2026 (arXiv 2511.17864), Theorem 1; least norm: this book"


@cache
def output_update() -> Derivation:
    r"""Derive the edit of least norm of the last map that adds a change to its output.

    $$\Delta W_\text{down} = \frac{\Delta h\, y^\top}{\|y\|^2}$$

    Source: Goldwaser et al. (arXiv 2511.17864), Theorem 1; that it has the least norm: this book.

    Shapes: the result, $\Delta W_\text{down}$, is a function of ``change`` $\Delta h$ ``[out]`` and ``hidden`` $y$
    ``[in]``.

    >>> import numpy as np
    >>> derivation = output_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([1.0, 2.0]), np.array([0.0, 2.0]))
    array([[0. , 0.5],
           [0. , 1. ]])
    """
    least = weight_update()
    multipliers = next(iter(least.solution))
    _, a_0, _ = least.arguments.values()
    W, edit = matrix(r"W_{\mathrm{down}}"), matrix(r"\Delta W_{\mathrm{down}}")
    y, change = vector("y"), sp.MatrixSymbol(r"\Delta h", OUT, 1)

    # The Lagrangian has the same gradient as that of weight_update: only the right side of the constraint differs.
    outer_product = least.step("outer product").shows[0].parts[1].xreplace({a_0: y})
    effect = (W + outer_product) * y - W * y - change
    found = rewritten(solved(expanded(effect), multipliers), change / squared_norm(y))
    update = rewritten(outer_product.xreplace({multipliers: found}), change * y.T / squared_norm(y))

    return Derivation(
        name="output_update",
        source=SOURCE,
        assumptions=(
            Step(
                "effect",
                "Added change",
                f"The last map reads the hidden activation ${latex(y)}$. With the edit its output grows by "
                f"${latex(change)}$.",
                Asked((W + edit) * y, W * y + change),
            ),
            Step("least norm", "Least norm", "We ask for the least such edit.", Minimise(squared_norm(edit) / 2)),
            Step("nonzero", "Nonzero activation", "No edit acts on zero.", Nonzero(y)),
        ),
        steps=(
            Step(
                "outer product",
                "Outer product",
                "As in `weight_update`, stationarity makes the edit a column of multipliers times what the map reads.",
                Asked(edit, outer_product),
            ),
            Step(
                "multipliers",
                "Multipliers",
                "The constraint determines them.",
                Asked(multipliers, found),
            ),
            Step("formula", "Formula", "The multipliers go into the product.", Asked(edit, update)),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, change * y.T / squared_norm(y)),
        arguments={"change": change, "hidden": y},
        shapes={"change": "out", "hidden": "in", "return": "out in"},
        solution={multipliers: found},
    )
