r"""The alignment of two weight updates, within one block and across two blocks."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step
from icl_lib.symbolic.notation import OUT, dot, matrix, number, rank_one, squared_norm, vector
from icl_lib.symbolic.position_weight_update import SOURCE, position_weight_update


@cache
def alignment() -> Derivation:
    r"""Derive the cosine of two weight updates from the cosines of their factors.

    $$\cos(\Delta W^\ell, \Delta W^k) = \cos(u^\ell, u^k)\, \cos(f^\ell, f^k), \qquad u = W (g - f)$$

    The cosine of two matrices is $\operatorname{tr}(D^\top E)$ over the product of their Frobenius norms. Within one
    block both updates have the right factor $f$, and only the first cosine is left. Across blocks the left factors
    compare hidden units by number: see :func:`~icl_lib.symbolic.hidden_permutation`.

    Source: the quantity of Innocenti and Achour (arXiv 2512.11255), version 1, Figures A.1, A.2, A.7 and A.8; the
    updates are those of their Theorem 1.

    Shapes: the result, a number, is a function of ``W_l`` ``[out, in]``, ``f_l`` ``[in]``, ``g_l`` ``[in]`` of one
    update, and of ``W_k``, ``f_k``, ``g_k`` of the other. It is defined where neither update is zero.

    >>> import numpy as np
    >>> derivation = alignment()
    >>> derivation.check()
    True
    >>> f, g = np.array([1.0, 0.0]), np.array([1.0, 2.0])
    >>> float(derivation.lambdify()(np.eye(2), f, g, -np.eye(2), f, g))
    -1.0
    """
    pair = TwoUpdates()
    cosine, within = number(r"\cos(\Delta W^\ell, \Delta W^k)"), number(r"\cos(\Delta W_i, \Delta W_j)")
    of_columns, of_rows = (number(rf"\cos(\boldsymbol{{{k}}}^\ell, \boldsymbol{{{k}}}^k)") for k in "uf")
    (D, E), (u, v), (f, g) = pair.updates, pair.columns, pair.rows
    u_i, u_j, shared = vector("u", OUT, "i"), vector("u", OUT, "j"), vector("f")
    one, two = (matrix(rf"\Delta W_{k}") for k in "ij")

    return Derivation(
        name="alignment",
        source=f"{SOURCE}, and their Figures A.1, A.2, A.7 and A.8",
        assumptions=dict(
            **pair.assumptions(),
            cosine=Step(
                "**Alignment.** The cosine of two matrices is that of their entries, taken as two long vectors.",
                Identity(cosine, _cosine(D, E)),
            ),
        ),
        steps=dict(
            inner_product=Step(
                "**Inner product.** It is the product of two inner products: one over hidden units, one over inputs.",
                Identity(dot(D, E), dot(u, v) * dot(f, g) / (squared_norm(f) * squared_norm(g))),
            ),
            norms=Step(
                "**Norms.** This is the first step for an update with itself.",
                Identity(squared_norm(D), squared_norm(u) / squared_norm(f)),
            ),
            product=Step(
                "**Across blocks.** The squared norms cancel. Each inner product is divided by the lengths of its own "
                "two vectors.",
                Identity(cosine, of_columns * of_rows),
                Identity(of_columns, _cosine(u, v)),
                Identity(of_rows, _cosine(f, g)),
            ),
            within=Step(
                "**Within one block.** Two positions share the right factor, so the alignment is that of the left "
                "factors.",
                Identity(one, rank_one(u_i, shared)),
                Identity(within, _cosine(u_i, u_j)),
            ),
        ),
        unknown=cosine,
        result=(_cosine(u, v) * _cosine(f, g)).xreplace(pair.names),
        statement=Asked(cosine, of_columns * of_rows),
        arguments=pair.arguments,
        names={
            **pair.names,
            cosine: _cosine(D, E),
            of_columns: _cosine(u, v),
            of_rows: _cosine(f, g),
            one: rank_one(u_i, shared),
            two: rank_one(u_j, shared),
            within: _cosine(one, two),
        },
        beyond=lambda candidate: (Identity(candidate, cosine),),
    )


class TwoUpdates:
    """The updates of two blocks at one position, as columns times rows."""

    def __init__(self) -> None:
        position = position_weight_update()
        self.arguments, self.updates, self.columns, self.rows, self.names = {}, [], [], [], {}
        for block, upper in (("l", r"\ell"), ("k", "k")):
            W, f, g = matrix(f"W^{{{upper}}}"), vector("f", upper=upper), vector("g", upper=upper)
            update, u = matrix(rf"\Delta W^{{{upper}}}"), vector("u", OUT, upper=upper)
            self.arguments |= {f"W_{block}": W, f"f_{block}": f, f"g_{block}": g}
            self.names |= {
                update: position.result.xreplace(dict(zip(position.arguments.values(), (W, f, g), strict=True))),
                u: W * (g - f),
            }
            self.updates.append(update)
            self.columns.append(u)
            self.rows.append(f)

    def assumptions(self) -> dict[str, Step]:
        """Return the two updates and that neither is zero."""
        (D, _), (u, _), (f, _) = self.updates, self.columns, self.rows
        return dict(
            updates=Step(
                "**Two weight updates.** Blocks $\\ell$ and $k$ have their weight updates at one position "
                "(`position_weight_update`).",
                Identity(D, rank_one(u, f)),
                Identity(u, self.names[u]),
            ),
            nonzero=Step(
                "**Nonzero updates.** The cosine with zero is not defined.", Nonzero(*self.columns, *self.rows)
            ),
        )


def _cosine(left: sp.MatrixExpr, right: sp.MatrixExpr) -> sp.Expr:
    return dot(left, right) / (sp.sqrt(squared_norm(left)) * sp.sqrt(squared_norm(right)))
