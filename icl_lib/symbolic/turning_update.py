r"""The edits of what a norm reads and of its scale, for a norm that must output a given vector."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import WIDTH, latex, squared_norm, vector


@cache
def turning_update() -> Derivation:
    r"""Derive how to turn what an RMS norm reads, and stretch its scale, so that it outputs a given vector.

    $$o' = \frac{\|o\|}{\|t \oslash \gamma\|}\, (t \oslash \gamma), \qquad
    \gamma' = \kappa\, \gamma, \qquad \kappa = \frac{\|t \oslash \gamma\|}{\|\bar o\|}$$

    An RMS norm outputs $\gamma \odot \bar o$ with $\bar o = o / \rho$, where $\rho$ depends on the length of $o$ alone.
    So $\bar o$ has a given length, and no $o$ makes the norm output an arbitrary vector $t$. The edit gives $o$ the
    direction of $t \oslash \gamma$ and keeps its length, and the stretch factor $\kappa$ of the scale makes up for the
    length of the output.

    Source: this book. The stable variant of Goldwaser et al. (arXiv 2511.17864) keeps the length as well, and lets the
    scale alone take what remains.

    Shapes: the result, $o'$ ``[dim]``, is a function of ``wanted`` $t$ ``[dim]``, ``read`` $o$ ``[dim]`` and ``scale``
    $\gamma$ ``[dim]``, which has no zero entry.

    >>> import numpy as np
    >>> derivation = turning_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([3.0, 4.0]), np.array([2.0, 0.0]), np.ones(2))
    array([1.2, 1.6])
    """
    wanted, read, scale = vector("t", WIDTH), vector("o", WIDTH), vector(r"\gamma", WIDTH)
    normed, new = sp.MatrixSymbol(r"\bar{\boldsymbol{o}}", WIDTH, 1), sp.MatrixSymbol(r"\boldsymbol{o}'", WIDTH, 1)
    divisor, stretch = (sp.Symbol(name, positive=True) for name in (r"\rho", r"\kappa"))
    diagonal, unscaled = sp.DiagMatrix(scale), vector(r"\tau", WIDTH)
    new_scale = sp.MatrixSymbol(r"\boldsymbol{\gamma}'", WIDTH, 1)
    names = {new_scale: stretch * scale, normed: read / divisor, unscaled: sp.Inverse(diagonal) * wanted}

    found = _stretch(unscaled, normed)
    turned = sp.sqrt(squared_norm(read)) / sp.sqrt(squared_norm(unscaled)) * unscaled

    return Derivation(
        name="turning_update",
        source="This book",
        assumptions=dict(
            norm=Step(
                f"**The norm.** It divides ${latex(read)}$ by a number $\\rho$ that depends only on the length of "
                f"${latex(read)}$, then scales entry by entry.",
                Identity(normed, read / divisor),
            ),
            effect=Step(
                f"**Given output.** With ${latex(new)}$ in the place of ${latex(read)}$, and its scale stretched by a "
                f"factor $\\kappa$, the norm outputs ${latex(wanted)}$.",
                Asked(diagonal * new, divisor / stretch * wanted),
            ),
            length=Step(
                f"**Same length.** Then $\\rho$ is the same for ${latex(new)}$.",
                Asked(squared_norm(new), squared_norm(read)),
            ),
            nonzero=Step(
                f"**Nonzero vectors.** No entry of ${latex(scale)}$ is zero.",
                Nonzero(wanted, read),
                Nonzero(sp.Symbol(r"\gamma_j", real=True)),
            ),
        ),
        steps=dict(
            direction=Step(
                f"**Direction.** We write ${latex(unscaled)}$ for ${latex(wanted)}$ divided by ${latex(scale)}$ entry "
                "by entry.",
                Identity(unscaled, names[unscaled]),
                Asked(new, divisor / stretch * unscaled),
            ),
            stretch=Step(
                "**Stretch factor.** The lengths determine it, since it is positive.",
                Asked(stretch**2, squared_norm(unscaled) / squared_norm(normed)),
                Asked(stretch, found),
                Identity(new_scale, stretch * scale),
            ),
            formula=Step("**What the norm reads.** It has the old length and the new direction.", Asked(new, turned)),
        ),
        unknown=new,
        result=turned.xreplace(names),
        statement=Asked(new, turned),
        arguments={"wanted": wanted, "read": read, "scale": scale},
        names=names,
        solution={stretch: found},
    )


def _stretch(unscaled: Any, normed: Any) -> Any:
    """Solve for κ, by which what is wanted must be divided to have the length of what the norm scales."""
    wanted, length, squared = sp.symbols("T O K")
    [found] = sp.solve(wanted / squared - length, squared)
    ratio = sp.sqrt(squared_norm(unscaled)) / sp.sqrt(squared_norm(normed))
    rewritten(found.xreplace({wanted: squared_norm(unscaled), length: squared_norm(normed)}), ratio**2)
    return ratio
