r"""The edit of the MLP's last map that adds a vector to its output."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Minimise, Nonzero, Step
from icl_lib.symbolic.notation import OUT, latex, matrix, squared_norm, vector
from icl_lib.symbolic.weight_update import LeastEdit


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
    W, edit, multipliers = matrix(r"W_{\mathrm{down}}"), matrix(r"\Delta W_{\mathrm{down}}"), vector(r"\lambda", OUT)
    y, change = vector("y"), sp.MatrixSymbol(r"\Delta h", OUT, 1)
    least = LeastEdit(W, edit, y, W * y + change, multipliers)
    found, update = least.solved_for(change)

    return Derivation(
        name="output_update",
        source="Goldwaser et al. 2026 (arXiv 2511.17864), Theorem 1; least norm: this book",
        assumptions=dict(
            effect=Step(
                f"**Added change.** The last map reads the hidden activation ${latex(y)}$. With the edit its output "
                f"grows by ${latex(change)}$.",
                Asked((W + edit) * y, W * y + change),
            ),
            least_norm=Step("**Least norm.** We ask for the least such edit.", Minimise(squared_norm(edit) / 2)),
            nonzero=Step("**Nonzero activation.** No edit acts on zero.", Nonzero(y)),
        ),
        steps=dict(
            outer_product=Step(
                "**Outer product.** As in `weight_update`, stationarity makes the edit a column of multipliers times "
                "what the map reads.",
                Asked(edit, least.outer_product),
            ),
            multipliers=Step("**Multipliers.** The constraint determines them.", Asked(multipliers, found)),
            formula=Step("**Formula.** The multipliers go into the product.", Asked(edit, update)),
        ),
        unknown=edit,
        result=update,
        arguments={"change": change, "hidden": y},
        solution={multipliers: found},
    )
