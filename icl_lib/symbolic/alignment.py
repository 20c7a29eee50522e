r"""The alignment of two weight updates, within one block and across two blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.every_position import SOURCE, WEIGHT_FORMULA, position_weight_update
from icl_lib.symbolic.notation import inner, matrix, positive_unless_zero, put, squared_norm, stacked, vector

U, F = r"\boldsymbol{u}", r"\boldsymbol{f}"
WITHIN = rf"\cos(\Delta W_i, \Delta W_j) = \cos({U}_i, {U}_j)"
ACROSS = (r"\cos(\Delta W^\ell, \Delta W^k)", rf"{{}} = \cos({U}^\ell, {U}^k)\, \cos({F}^\ell, {F}^k)")
UPDATES = stacked(
    rf"\Delta W^\ell = \frac{{{U}^\ell\, {F}^{{\ell\top}}}}{{\|{F}^\ell\|^2}}",
    rf"{U}^\ell = W^\ell (\boldsymbol{{g}}^\ell - {F}^\ell)",
)


@dataclass(frozen=True, eq=False)
class OuterProducts:
    r"""Two updates $D = u f^\top / \|f\|^2$, with what their cosine is made of.

    SymPy does not decide whether expressions with square roots are zero, so the cosine rests on two statements without
    them: what the inner product is, and what the squared norms are.
    """

    updates: tuple[sp.MatrixBase, sp.MatrixBase]
    columns: tuple[sp.MatrixBase, sp.MatrixBase]
    rows: tuple[sp.MatrixBase, sp.MatrixBase]

    def inner_product(self) -> sp.Expr:
        """Return the inner product of the updates, derived."""
        squares = squared_norm(self.rows[0]) * squared_norm(self.rows[1])
        return rewritten(inner(*self.updates), inner(*self.columns) * inner(*self.rows) / squares)

    def squared_norms(self) -> tuple[sp.Expr, sp.Expr]:
        """Return the squared norms of the updates, derived."""
        first, second = (
            rewritten(squared_norm(update), squared_norm(column) / squared_norm(row))
            for update, column, row in zip(self.updates, self.columns, self.rows, strict=True)
        )
        return first, second

    def cosine(self) -> sp.Expr:
        """Return the inner product over the product of the norms, which SymPy cancels knowing them to be positive."""
        if not all(map(positive_unless_zero, (matrix("u", *self.columns[0].shape), matrix("f", *self.rows[0].shape)))):
            raise ArithmeticError("SymPy does not prove the squared norm of a vector that is not zero positive")
        norms = [sp.Symbol(f"n_{k}", positive=True) for k in range(4)]
        if self.rows[0] == self.rows[1]:
            norms[3] = norms[2]
        of_columns, of_rows = sp.symbols("p q", real=True)
        product = of_columns * of_rows / (norms[2] ** 2 * norms[3] ** 2)
        found = product / (sp.sqrt(norms[0] ** 2 / norms[2] ** 2) * sp.sqrt(norms[1] ** 2 / norms[3] ** 2))
        values = {norm: sp.sqrt(squared_norm(of)) for norm, of in zip(norms, (*self.columns, *self.rows), strict=True)}
        return found.xreplace({of_columns: inner(*self.columns), of_rows: inner(*self.rows), **values})

    def must_vanish(self, candidate: Any) -> Mapping[str, Any]:
        """Return what is zero if and only if the candidate times both norms is the inner product."""
        squares = [squared_norm(row) for row in self.rows]
        lengths = sp.Mul(*(sp.sqrt(squared_norm(of)) for of in (*self.columns, *self.rows)))
        norms = [squared_norm(update) * square for update, square in zip(self.updates, squares, strict=True)]
        return {
            "inner product": inner(*self.updates) * squares[0] * squares[1] - candidate * lengths,
            "norm of the first": norms[0] - squared_norm(self.columns[0]),
            "norm of the second": norms[1] - squared_norm(self.columns[1]),
        }


@lru_cache(maxsize=None, typed=True)
def alignment_within(out_features: int, in_features: int) -> Derivation:
    r"""Derive the alignment of the weight updates of one block at two positions.

    $$\cos(\Delta W_i, \Delta W_j) = \cos(u_i, u_j), \qquad u_i = W (g_i - f)$$

    The cosine of two matrices is $\operatorname{tr}(\Delta W_i^\top \Delta W_j)$ over the product of their Frobenius
    norms. The right factor, which the two have in common, drops out.

    Source: the quantity of Innocenti and Achour, Figures A.1, A.7 and A.8; the updates are those of their Theorem 1.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, a number, is a function of ``W`` ``[out, in]``,
    ``f`` ``[in]``, ``g_i`` ``[in]`` and ``g_j`` ``[in]``. It is defined where neither update is zero.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = alignment_within(2, 2)
    >>> derivation.check()
    True
    >>> f, g_i, g_j = np.array([1.0, 1.0]), np.array([1.0, 2.0]), np.array([2.0, 2.0])
    >>> round(float(derivation.lambdify()(np.eye(2), f, g_i, g_j)), 6)  # between (0, 1) and (1, 1)
    0.707107
    """
    position = position_weight_update(out_features, in_features)
    W, f, g_i = (position.arguments[name] for name in ("W", "f", "g_i"))
    g_j = vector("g", in_features, "j")
    update_i, update_j = position.result, put(position.result, (g_i, g_j))
    pair = OuterProducts((update_i, update_j), (W * (g_i - f), W * (g_j - f)), (f, f))

    return Derivation(
        name="alignment_within",
        source=f"{SOURCE}, and their Figure A.1",
        assumptions=(
            Step(
                "Position update",
                update_i,
                WEIGHT_FORMULA,
                "Two positions $i$ and $j$ of one block have their weight updates: this is `position_weight_update`.",
            ),
            Step(
                "Alignment",
                inner(*pair.updates),
                stacked(
                    r"\cos(\Delta W_i, \Delta W_j)",
                    r"{} = \frac{\operatorname{tr}(\Delta W_i^{\top} \Delta W_j)}"
                    r"{\|\Delta W_i\|_F\, \|\Delta W_j\|_F}",
                ),
                "The cosine of two matrices is that of their entries, taken as two long vectors.",
            ),
            Step(
                "Something changes",
                tuple(sp.Ne(squared_norm(of), 0) for of in (f, *pair.columns)),
                rf"{F},\; {U}_i,\; {U}_j \neq \boldsymbol{{0}}",
                f"With ${U}_i = W (\\boldsymbol{{g}}_i - {F})$, neither update is zero: the cosine with zero is not "
                "defined.",
            ),
        ),
        steps=(
            Step(
                "Inner product",
                pair.inner_product(),
                rf"\operatorname{{tr}}(\Delta W_i^{{\top}} \Delta W_j) = \frac{{{U}_i^{{\top}} {U}_j}}{{\|{F}\|^2}}",
                "Each entry of an update is an entry of its column times an entry of the row that they share, so the "
                "sum of the products of all entries falls into two sums.",
            ),
            Step(
                "Norms",
                pair.squared_norms(),
                rf"\|\Delta W_i\|_F^2 = \frac{{\|{U}_i\|^2}}{{\|{F}\|^2}}",
                "The same with an update and itself. SymPy proves a sum of squares positive as soon as one entry is "
                "not zero, so the square roots are positive numbers.",
            ),
            Step(
                "Cosine",
                pair.cosine(),
                stacked(
                    r"\cos(\Delta W_i, \Delta W_j)",
                    rf"{{}} = \frac{{{U}_i^{{\top}} {U}_j}}{{\|{U}_i\|\, \|{U}_j\|}}",
                ),
                f"With positive norms SymPy cancels $\\|{F}\\|^2$: the alignment within a block is that of the left "
                "factors.",
            ),
        ),
        result=pair.cosine(),
        latex=WITHIN,
        arguments={"W": W, "f": f, "g_i": g_i, "g_j": g_j},
        shapes={"W": "out in", "f": "in", "g_i": "in", "g_j": "in", "return": ""},
        must_vanish=pair.must_vanish,
    )


@lru_cache(maxsize=None, typed=True)
def alignment_across(out_features: int, in_features: int) -> Derivation:
    r"""Derive the alignment of the weight updates of two blocks of the same sizes.

    $$\cos(\Delta W^\ell, \Delta W^k) = \cos(u^\ell, u^k)\, \cos(f^\ell, f^k), \qquad u = W (g - f)$$

    Each block has its own right factor. The left factors count hidden units, and those of different blocks have
    nothing to do with each other: see :func:`~icl_lib.symbolic.hidden_permutation`.

    Source: the quantity of Innocenti and Achour, Figure A.2; the updates are those of their Theorem 1.

    Shapes: both $W$ are ``out_features`` × ``in_features``. The result, a number, is a function of ``W_l``
    ``[out, in]``, ``f_l`` ``[in]``, ``g_l`` ``[in]`` of one block, and of ``W_k``, ``f_k``, ``g_k`` of the other. It is
    defined where neither update is zero.

    Raises `ValueError` for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = alignment_across(2, 2)
    >>> derivation.check()
    True
    >>> f, g = np.array([1.0, 0.0]), np.array([1.0, 2.0])
    >>> float(derivation.lambdify()(np.eye(2), f, g, -np.eye(2), f, g))
    -1.0
    """
    pair, arguments = two_blocks(out_features, in_features)
    return Derivation(
        name="alignment_across",
        source=f"{SOURCE}, and their Figure A.2",
        assumptions=(
            Step(
                "Position updates",
                pair.updates,
                UPDATES,
                "Two blocks, $\\ell$ and $k$, have their weight updates at one position: this is "
                "`position_weight_update`.",
            ),
            Step(
                "Alignment",
                inner(*pair.updates),
                stacked(
                    r"\cos(\Delta W^\ell, \Delta W^k)",
                    r"{} = \frac{\operatorname{tr}(\Delta W^{\ell\top} \Delta W^k)}"
                    r"{\|\Delta W^\ell\|_F\, \|\Delta W^k\|_F}",
                ),
                "The cosine of two matrices is that of their entries, which supposes that they have the same shape.",
            ),
            Step(
                "Something changes",
                tuple(sp.Ne(squared_norm(of), 0) for of in (*pair.rows, *pair.columns)),
                stacked(
                    rf"{F}^\ell,\; {F}^k \neq \boldsymbol{{0}}",
                    rf"{U}^\ell,\; {U}^k \neq \boldsymbol{{0}}",
                ),
                "Neither update is zero: the cosine with zero is not defined.",
            ),
        ),
        steps=(
            Step(
                "Inner product",
                pair.inner_product(),
                stacked(
                    r"\operatorname{tr}(\Delta W^{\ell\top} \Delta W^k)",
                    rf"{{}} = \frac{{({U}^{{\ell\top}} {U}^k)\, ({F}^{{\ell\top}} {F}^k)}}"
                    rf"{{\|{F}^\ell\|^2\, \|{F}^k\|^2}}",
                ),
                "The sum of the products of all entries falls into one sum over hidden units and one over inputs.",
            ),
            Step(
                "Norms",
                pair.squared_norms(),
                rf"\|\Delta W^\ell\|_F^2 = \frac{{\|{U}^\ell\|^2}}{{\|{F}^\ell\|^2}}",
                "The same with an update and itself; the norms are positive because neither factor is zero.",
            ),
            Step(
                "Cosine",
                pair.cosine(),
                stacked(*ACROSS),
                "Each inner product takes the two norms that belong to it.",
            ),
        ),
        result=pair.cosine(),
        latex=stacked(*ACROSS),
        arguments=arguments,
        shapes={**{name: "out in" if name.startswith("W") else "in" for name in arguments}, "return": ""},
        must_vanish=pair.must_vanish,
    )


def two_blocks(out_features: int, in_features: int) -> tuple[OuterProducts, dict[str, sp.MatrixBase]]:
    """Return the updates of two blocks at one position, and the symbols they are made of by name."""
    position = position_weight_update(out_features, in_features)
    symbols, updates, columns, rows = {}, [], [], []
    for block, superscript in (("l", r"\ell"), ("k", "k")):
        W = matrix(f"W^{{{superscript}}}", out_features, in_features)
        f, g = (vector(f"{letter}^{{{superscript}}}", in_features) for letter in "fg")
        symbols |= {f"W_{block}": W, f"f_{block}": f, f"g_{block}": g}
        updates.append(put(position.result, *zip(position.arguments.values(), (W, f, g), strict=True)))
        columns.append(W * (g - f))
        rows.append(f)
    return OuterProducts(tuple(updates), tuple(columns), tuple(rows)), symbols
