r"""One edit for several queries at once."""

from __future__ import annotations

from functools import cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.algebra import solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Minimise, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, QUERIES, latex, matrix, number, squared_norm
from icl_lib.symbolic.weight_update import LeastEdit, N, weight_update

V, Z_0, Z_C = matrix("V"), matrix("Z_0", IN, QUERIES), matrix("Z_C", IN, QUERIES)


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
    edit, multipliers, right = matrix(r"\Delta V"), matrix(r"\Lambda", OUT, QUERIES), matrix(r"\Lambda G", OUT, QUERIES)
    least = LeastEdit(V, edit, Z_0, V * Z_C, multipliers)
    gram, pseudo_inverse = Z_0.T * Z_0, matrix("Z_0^{+}", QUERIES, IN)

    # The constraint is linear in Λ (Z₀ᵀZ₀): solve for that, then multiply by the inverse.
    product = rewritten(solved((V * Z_0 + right) - V * Z_C, right), V * (Z_C - Z_0))
    found = product * sp.Inverse(gram)
    update = least.outer_product.xreplace({multipliers: found})

    return Derivation(
        name="joint_weight_update",
        source="This book; one query: Dherin et al. 2025 (arXiv 2507.16003), version 4, Theorem 2.3",
        assumptions=_assumptions(edit, gram),
        steps=dict(
            lagrangian=Step(
                "**Lagrangian.** There is one multiplier for each output and column.",
                Identity(least.value, least.names[least.value]),
            ),
            stationarity=Step(
                "**Stationarity.** The gradient with respect to the edit is zero. So the rank is at most the number of "
                "columns.",
                Asked(edit, least.outer_product),
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
                Asked(least.nearby - least.value, squared_norm(N) / 2),
            ),
            one_query=_one_query(update),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, V * (Z_C - Z_0) * pseudo_inverse),
        arguments={"V": V, "Z_without": Z_0, "Z_with": Z_C},
        names={**least.names, pseudo_inverse: sp.Inverse(gram) * Z_0.T},
        solution={multipliers: found},
    )


def _one_query(update: Any) -> Step:
    """Return the step that compares the update for one query with that of `weight_update`."""
    W, a_0, a_C = weight_update().arguments.values()
    of_one = update.subs(QUERIES, 1).xreplace({V: W, Z_0.subs(QUERIES, 1): a_0, Z_C.subs(QUERIES, 1): a_C})
    return Step(
        "**One column.** With one column the formula is that of `weight_update`.",
        Identity(of_one, weight_update().result),
    )


def _assumptions(edit: Any, gram: Any) -> dict[str, Step]:
    """Return what is asked of the edit, and of what the map reads."""
    return dict(
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
    )
