r"""One edit for several queries at once."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, dot, latex, matrix, number, rank_one, squared_norm
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "This book; one query: Dherin et al. 2025 (arXiv 2507.16003), version 4, Theorem 2.3"
QUERIES = sp.Symbol("q", integer=True, positive=True)


@cache
def joint_weight_update() -> Derivation:
    r"""Derive the edit of least norm that serves several queries, from its normal equations.

    $$\Delta V = V (Z_C - Z_0)\, Z_0^+, \qquad Z_0^+ = (Z_0^\top Z_0)^{-1} Z_0^\top$$

    The columns of $Z_0$ and $Z_C$ are what the map reads without and with the context, one for each query. Those of
    $Z_0$ are linearly independent, so $Z_0^\top Z_0$ has an inverse.

    Source: this book; one query: Dherin et al. (arXiv 2507.16003), version 4, Theorem 2.3.

    Shapes: the result, $\Delta V$, is a function of ``V`` ``[out, in]``, ``Z_without`` ``[in, queries]`` and ``Z_with``
    ``[in, queries]``.

    >>> import numpy as np
    >>> derivation = joint_weight_update()
    >>> derivation.check()
    True
    >>> Z_0, Z_C = np.array([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), np.ones((3, 2))
    >>> (np.eye(3) + derivation.lambdify()(np.eye(3), Z_0, Z_C)) @ Z_0  # = Z_C
    array([[1., 1.],
           [1., 1.],
           [1., 1.]])
    """
    V, edit, multipliers = matrix("V"), matrix(r"\Delta V"), matrix(r"\Lambda", OUT, QUERIES)
    Z_0, Z_C = matrix("Z_0", IN, QUERIES), matrix("Z_C", IN, QUERIES)
    pseudo_inverse, right = matrix("Z_0^{+}", QUERIES, IN), matrix(r"\Lambda G", OUT, QUERIES)
    gram, change = Z_0.T * Z_0, matrix("N")
    lagrangian, nearby = number(r"\mathcal{L}(\Delta V)"), number(r"\mathcal{L}(\Delta V + N)")

    def value(at: sp.MatrixExpr) -> sp.Expr:
        return squared_norm(at) / 2 - dot(multipliers, (V + at) * Z_0 - V * Z_C)

    stationary = rewritten(solved(gradient(value(edit), edit), edit), multipliers * Z_0.T)
    # The constraint is linear in Λ (Z₀ᵀZ₀): solve for that, then multiply by the inverse.
    product = rewritten(solved((V * Z_0 + right) - V * Z_C, right), V * (Z_C - Z_0))
    found = product * sp.Inverse(gram)
    update = stationary.xreplace({multipliers: found})

    single = weight_update()
    W, a_0, a_C = single.arguments.values()
    one_query = update.subs(QUERIES, 1).xreplace({V: W, Z_0.subs(QUERIES, 1): a_0, Z_C.subs(QUERIES, 1): a_C})

    return Derivation(
        name="joint_weight_update",
        source=SOURCE,
        assumptions=dict(
            effect=Step(
                "**Same pre-activations.** The columns are what the map reads, one for each token of the query, or for "
                "each of several queries. For every column the edited map returns what the map returns with the "
                "context.",
                Asked((V + edit) * Z_0, V * Z_C),
            ),
            least_norm=Step("**Least norm.** We ask for the least such edit.", Minimise(squared_norm(edit) / 2)),
            independent=Step(
                f"**Independent reads.** The columns of ${latex(Z_0)}$ are linearly independent, so the matrix of "
                "their inner products has an inverse.",
                Nonzero(number(rf"\det({latex(gram)})")),
            ),
        ),
        steps=dict(
            lagrangian=Step(
                "**Lagrangian.** There is one multiplier for each output and column.", Identity(lagrangian, value(edit))
            ),
            stationarity=Step(
                "**Stationarity.** The gradient with respect to the edit is zero. So the rank is at most the number of "
                "columns.",
                Asked(edit, stationary),
            ),
            normal_equations=Step(
                "**Normal equations.** The constraint determines the multipliers.",
                Asked(multipliers * gram, V * (Z_C - Z_0)),
                Asked(multipliers, found),
            ),
            formula=Step(
                f"**Formula.** The last factors are the Moore–Penrose inverse of ${latex(Z_0)}$.",
                Asked(edit, V * (Z_C - Z_0) * pseudo_inverse),
                Identity(pseudo_inverse, sp.Inverse(gram) * Z_0.T),
                Identity(pseudo_inverse * Z_0, sp.Identity(QUERIES)),
            ),
            second_order=Step(
                "**Minimum.** A change $N$ raises the Lagrangian by half its squared norm, so every other edit that "
                "satisfies the constraint is larger.",
                Asked(nearby - lagrangian, squared_norm(change) / 2),
            ),
            one_query=Step(
                "**One column.** With one column the formula is that of `weight_update`.",
                Identity(one_query, rank_one(W * (a_C - a_0), a_0)),
            ),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, V * (Z_C - Z_0) * pseudo_inverse),
        arguments={"V": V, "Z_without": Z_0, "Z_with": Z_C},
        names={pseudo_inverse: sp.Inverse(gram) * Z_0.T, lagrangian: value(edit), nearby: value(edit + change)},
        solution={multipliers: found},
    )
