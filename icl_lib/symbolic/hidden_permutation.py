r"""Hidden units have no order that the network depends on, and the alignment across blocks depends on it."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import Applied
from icl_lib.symbolic.alignment import TwoUpdates
from icl_lib.symbolic.derivation import Derivation, Given, Identity, Step
from icl_lib.symbolic.notation import IN, OUT, dot, latex, matrix, number, rank_one, squared_norm, vector

SOURCE = "This book; the alignment across blocks is that of Innocenti, Achour 2025 (arXiv 2512.11255), Figure A.2"


@cache
def hidden_permutation() -> Derivation:
    r"""Derive that renumbering hidden units leaves the network as it is and changes the alignment across blocks.

    $$W' P^\top \sigma(P W z + P b) = W' \sigma(W z + b), \qquad
    \langle P \Delta W^\ell, \Delta W^k \rangle - \langle \Delta W^\ell, \Delta W^k \rangle
    = \frac{\bigl((P u^\ell - u^\ell)^\top u^k\bigr) \bigl(f^{\ell\top} f^k\bigr)}{\|f^\ell\|^2 \|f^k\|^2}$$

    $P$ is any permutation of the hidden units of block $\ell$. The block computes the same, so $g$ and $f$ are the same
    in all blocks. Its own update becomes $P \Delta W^\ell$, of the same norm. The inner product with another block's
    update changes, unless $u^k$ is perpendicular to the change of $u^\ell$.

    Source: this book; the alignment across blocks is that of Innocenti and Achour (arXiv 2512.11255), Figure A.2.

    Shapes: the result, a number, is by how much the inner product of the two updates changes, as a function of ``P``
    ``[out, out]``, of ``W_l`` ``[out, in]``, ``f_l`` ``[in]``, ``g_l`` ``[in]``, and of ``W_k``, ``f_k``, ``g_k``.

    >>> import numpy as np
    >>> derivation = hidden_permutation()
    >>> derivation.check()
    True
    >>> W, f, g = np.array([[1.0], [0.0]]), np.array([1.0]), np.array([2.0])
    >>> P = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> float(derivation.lambdify()(P, W, f, g, W, f, g))  # two equal updates, until the units of one are exchanged
    -1.0
    """
    pair = TwoUpdates()
    (D, E), (u, v), (f, g) = pair.updates, pair.columns, pair.rows
    P, W, z, b = matrix("P", OUT, OUT), pair.arguments["W_l"], vector("z"), sp.MatrixSymbol("b", OUT, 1)
    W_out, read = matrix("W'", IN, OUT), pair.arguments["g_l"]
    renumbered, second = matrix(r"\Delta W^{\ell}_{P}"), matrix(r"\Delta W^{\ell}_{j}")

    def active(reads: sp.MatrixExpr) -> Applied:
        return Applied(r"\sigma", (OUT, 1), reads)

    own = P * D
    change = dot(own, E) - dot(D, E)
    result = dot(P * u - u, v) * dot(f, g) / (squared_norm(f) * squared_norm(g))

    return Derivation(
        name="hidden_permutation",
        source=SOURCE,
        assumptions=dict(
            permutation=Step(
                "**A permutation.** $P$ renumbers the hidden units of block $\\ell$. Its transpose undoes that.",
                Given(P.T * P, sp.Identity(OUT)),
            ),
            entry_by_entry=Step(
                "**The activation acts entry by entry.** So it does not matter whether units are renumbered before or "
                "after it.",
                Given(active(P * W * z + P * b), P * active(W * z + b)),
            ),
            **pair.assumptions(),
        ),
        steps=dict(
            same_function=Step(
                "**Same function.** Renumber the rows of the first map and its bias, and the columns of the last map: "
                f"the MLP computes the same. So all streams are the same, and with them ${latex(read)}$ and "
                f"${latex(f)}$ in all blocks.",
                Identity(W_out * P.T * active(P * W * z + P * b), W_out * active(W * z + b)),
            ),
            own_update=Step(
                "**The block's own update.** Its rows are renumbered. Inner products within the block, and so norms "
                "and alignments, stay the same.",
                Identity(renumbered, own),
                Identity(dot(P * D, P * second), dot(D, second)),
            ),
            other_update=Step(
                "**The inner product with another block.** It changes by this amount, which is zero only if one of the "
                "two inner products is.",
                Identity(change, result),
            ),
        ),
        unknown=number("d"),
        result=result.xreplace(pair.names),
        statement=Identity(change, result),
        arguments={"P": P, **pair.arguments},
        names={**pair.names, renumbered: rank_one((P * W) * (read - f), f)},
        beyond=lambda candidate: (Identity(candidate, change),),
    )
