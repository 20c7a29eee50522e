r"""The best single edit of a weight for a sample of queries, and what it cannot serve."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import gradient
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, SAMPLE, latex, matrix, number, squared_norm
from icl_lib.symbolic.weight_update import N

W, WITHOUT, CHANGE = matrix("W"), matrix("A", IN, SAMPLE), matrix("D", IN, SAMPLE)


@cache
def static_update() -> Derivation:
    r"""Derive the edit of a weight that is best on average over a sample of queries.

    $$\Delta W = W\, \Sigma_{\delta a} \Sigma_{aa}^{-1}$$

    The columns of $A$ are what the map reads without the context, $a_0$, one for each query, and those of $D$ are the
    changes $\delta = a_C - a_0$ that the context makes. $\Sigma_{aa}$ has an inverse, so there are at least as many
    queries as features.

    Source: this book; the fit to several queries: Mazzawi et al. (arXiv 2510.08734).

    Shapes: the result, $\Delta W$, is a function of ``W`` ``[out, in]``, ``A`` ``[in, sample]`` and ``D``
    ``[in, sample]``.

    >>> import numpy as np
    >>> derivation = static_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(1), np.array([[1.0, 2.0]]), np.array([[3.0, 6.0]]))
    array([[3.]])
    """
    edit, slope = matrix(r"\Delta W"), matrix(r"\nabla\mathcal{E}(\Delta W)")
    error, nearby = (number(rf"\mathcal{{E}}({at})") for at in (edit.name, f"{edit.name} + N"))
    names = (r"\Sigma_{aa}", r"\Sigma_{\delta a}", r"\Sigma_{\delta\delta}")
    both, cross, of_change = (sp.MatrixSymbol(name, IN, IN) for name in names)
    rest = sp.MatrixSymbol(r"\Sigma_{\delta|a}", IN, IN)
    products = (WITHOUT * WITHOUT.T, CHANGE * WITHOUT.T, CHANGE * CHANGE.T)
    means = {name: product / SAMPLE for name, product in zip((both, cross, of_change), products, strict=True)}

    def missed(of: sp.MatrixExpr) -> sp.Expr:
        return squared_norm(of * WITHOUT - W * CHANGE) / SAMPLE

    formula = W * cross * sp.Inverse(both)

    return Derivation(
        name="static_update",
        source="This book; the fit to several queries: Mazzawi et al. 2025 (arXiv 2510.08734)",
        assumptions=dict(
            sample=Step(
                "**A sample.** The means over the queries of products of what is read and of the change.",
                *(Identity(name, mean) for name, mean in means.items()),
            ),
            error=Step(
                "**Mean error.** There is one edit for all queries. Its error is the mean squared distance of the "
                "outputs to those with the context.",
                Identity(error, missed(edit)),
            ),
            enough=Step(
                "**Enough queries.** Together they read every direction.", Nonzero(number(rf"\det({latex(both)})"))
            ),
        ),
        steps=dict(
            stationarity=Step(
                "**Stationarity.** At the minimum the gradient is zero.",
                Identity(slope, 2 * (edit * both - W * cross)),
                Asked(slope, sp.ZeroMatrix(OUT, IN)),
            ),
            formula=Step("**Formula.** The second moments of what is read have an inverse.", Asked(edit, formula)),
            second_order=Step(
                "**Minimum.** Any other edit has a larger error, since the queries read every direction.",
                Asked(nearby - error, squared_norm(N * WITHOUT) / SAMPLE),
            ),
            residual=Step(
                "**What no edit serves.** The error of the best edit is the part of the change that is not linear in "
                "what is read.",
                Identity(rest, of_change - cross * sp.Inverse(both) * cross.T),
                Asked(error, sp.Trace(W * rest * W.T)),
            ),
        ),
        unknown=edit,
        result=rewritten(formula.xreplace(means), W * CHANGE * WITHOUT.T * sp.Inverse(WITHOUT * WITHOUT.T)),
        statement=Asked(edit, formula),
        arguments={"W": W, "A": WITHOUT, "D": CHANGE},
        names={
            **means,
            rest: of_change - cross * sp.Inverse(both) * cross.T,
            error: missed(edit),
            nearby: missed(edit + N),
            slope: gradient(missed(edit), edit),
        },
    )
