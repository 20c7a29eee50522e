r"""The edit of a norm's scale that adds a vector to the norm's output."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import solved
from icl_lib.symbolic.derivation import Asked, Derivation, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import WIDTH, latex, vector


@cache
def scale_update() -> Derivation:
    r"""Derive the edit of the scale of a norm behind the MLP that adds a change to the norm's output.

    $$\Delta\gamma = \Delta h \oslash \bar o, \qquad
    \operatorname{diag}(\bar o)\, (\gamma + \Delta\gamma) = \operatorname{diag}(\bar o)\, \gamma + \Delta h$$

    $\bar o$ is the normed activation before it is scaled. Multiplying by $\operatorname{diag}(\bar o)$ scales entry by
    entry, so its inverse divides entry by entry. It exists if no entry of $\bar o$ is zero.

    Source: Goldwaser et al. (arXiv 2511.17864), Theorem 1.

    Shapes: the result, $\Delta\gamma$ ``[dim]``, is a function of ``change`` $\Delta h$ ``[dim]`` and ``normed``
    $\bar o$ ``[dim]``.

    >>> import numpy as np
    >>> derivation = scale_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([1.0, 3.0]), np.array([2.0, -1.0]))
    array([ 0.5, -3. ])
    """
    normed, scale = sp.MatrixSymbol(r"\bar{\boldsymbol{o}}", WIDTH, 1), vector(r"\gamma", WIDTH)
    change, edit = (sp.MatrixSymbol(name, WIDTH, 1) for name in (r"\Delta h", r"\Delta\boldsymbol{\gamma}"))
    scaled, diagonal = sp.MatrixSymbol(r"\boldsymbol{q}", WIDTH, 1), sp.DiagMatrix(normed)

    # With q for what the scale's edit contributes, the constraint is linear in q; the diagonal is then inverted.
    contribution = rewritten(solved(diagonal * scale + scaled - diagonal * scale - change, scaled), change)
    update = sp.Inverse(diagonal) * contribution

    return Derivation(
        name="scale_update",
        source="Goldwaser et al. 2026 (arXiv 2511.17864), Theorem 1",
        assumptions=dict(
            effect=Step(
                f"**Added change.** The norm scales ${latex(normed)}$ by ${latex(scale)}$, entry by entry. With the "
                f"edit its output grows by ${latex(change)}$.",
                Asked(diagonal * (scale + edit), diagonal * scale + change),
            ),
            nonzero=Step(
                "**No entry is zero.** The scale cannot change an entry that is zero.",
                Nonzero(sp.Symbol(r"\bar{o}_j", real=True)),
            ),
        ),
        steps=dict(
            contribution=Step(
                "**What the edit contributes.** The unedited output cancels.", Asked(diagonal * edit, contribution)
            ),
            inverse=Step(
                "**Division entry by entry.** A diagonal matrix without zeros has an inverse, so there is one solution "
                "only.",
                Asked(edit, update),
            ),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, sp.Inverse(diagonal) * change),
        arguments={"change": change, "normed": normed},
    )
