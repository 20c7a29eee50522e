r"""Hidden units have no order that the network knows of, and the alignment across blocks depends on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import combinations
from typing import Any

import sympy as sp

from icl_lib.symbolic.alignment import UPDATES, F, U, alignment_across, two_blocks
from icl_lib.symbolic.derivation import Derivation, Step, rewritten, vanishes
from icl_lib.symbolic.every_position import BIAS_FORMULA, position_bias_update
from icl_lib.symbolic.notation import checked_sizes, inner, matrix, put, squared_norm, stacked, vector
from icl_lib.symbolic.residual_block import ACTIVATION, READ, READ_ALONE, residual_block

CHANGE = (
    r"\langle P \Delta W^\ell, \Delta W^k \rangle - \langle \Delta W^\ell, \Delta W^k \rangle",
    r"{} = -(u^\ell_1 - u^\ell_2)\, (u^k_1 - u^k_2)",
    rf"{{}} \times \frac{{{F}^{{\ell\top}} {F}^k}}{{\|{F}^\ell\|^2\, \|{F}^k\|^2}}",
)


@lru_cache(maxsize=None, typed=True)
def hidden_permutation(out_features: int, in_features: int) -> Derivation:
    r"""Derive that exchanging hidden units leaves the network as it is and changes the alignment across blocks.

    $$W' P^\top \sigma(P W z + P b) = W' \sigma(W z + b), \qquad
    \langle P \Delta W^\ell, \Delta W^k \rangle \ne \langle \Delta W^\ell, \Delta W^k \rangle \text{ in general}$$

    $P$ exchanges the first two hidden units of block $\ell$; every permutation is made of such exchanges. The block
    computes the same, so $g - f$ and $\Delta b'$ are the same in all blocks, and so is the alignment within a block.
    Its own update becomes $P \Delta W^\ell$, of the same norm, and the alignment with another block moves.

    Source: ours; the alignment across blocks is that of Innocenti and Achour, Figure A.2.

    Shapes: both $W$ are ``out_features`` × ``in_features``. The result, a number, is by how much the inner product of
    the two updates changes, as a function of ``W_l`` ``[out, in]``, ``f_l`` ``[in]``, ``g_l`` ``[in]``, and of ``W_k``,
    ``f_k``, ``g_k``.

    Raises `ValueError` for a size that is not a whole number of at least 1, and for a single hidden unit.

    >>> import numpy as np
    >>> derivation = hidden_permutation(2, 1)
    >>> derivation.check()
    True
    >>> W, f, g = np.array([[1.0], [0.0]]), np.array([1.0]), np.array([2.0])
    >>> float(derivation.lambdify()(W, f, g, W, f, g))  # two equal updates, until the units of one are exchanged
    -1.0
    """
    checked_sizes(out_features=out_features, in_features=in_features)
    if out_features == 1:
        raise ValueError("out_features=1 leaves no two hidden units to exchange: give at least 2")
    block, z = residual_block(out_features, in_features, "symbol"), vector("z", in_features)
    W, b, outer_weight = block.weight, block.hidden_bias, block.outer_weight
    exchanges = [_exchange(out_features, pair) for pair in combinations(range(out_features), 2)]
    P = exchanges[0]

    mlp = outer_weight * (W * z + b).applyfunc(ACTIVATION)
    permuted = [put(mlp, (W, E * W), (b, E * b), (outer_weight, outer_weight * E.T)) for E in exchanges]
    same = [rewritten(other, mlp) for other in permuted]

    in_the_stream = (block.read - block.read_alone, position_bias_update(out_features, in_features).result)
    if any(quantity.free_symbols & set((*W, *b, *outer_weight)) for quantity in in_the_stream):
        raise ArithmeticError("the residual stream depends on how the hidden units are numbered")

    pair, arguments = two_blocks(out_features, in_features)
    (update, other), W_l = pair.updates, arguments["W_l"]
    moved = rewritten(put(update, (W_l, P * W_l)), P * update)
    # At two positions of one block both updates move alike, whatever they are.
    at_i, at_j = (matrix(rf"\Delta W^{{{label}}}", out_features, in_features) for label in "ij")
    within = rewritten(inner(P * at_i, P * at_j), inner(at_i, at_j))

    (u, v), squares = pair.columns, squared_norm(pair.rows[0]) * squared_norm(pair.rows[1])
    change = rewritten(
        inner(moved, other) - inner(update, other), -(u[0] - u[1]) * (v[0] - v[1]) * inner(*pair.rows) / squares
    )
    if vanishes(change):
        raise ArithmeticError("the inner product is the same for all weights")
    before, after = _example(alignment_across(out_features, in_features), P)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {
            "same function": sp.ImmutableMatrix.vstack(*(other - mlp for other in permuted)),
            "same norm": squared_norm(P * update) - squared_norm(update),
            "change": inner(put(update, (W_l, P * W_l)), other) - inner(update, other) - candidate,
        }

    return Derivation(
        name="hidden_permutation",
        source="Ours, on the alignment of Innocenti, Achour 2025 (arXiv 2512.11255), Figure A.2",
        assumptions=(
            Step(
                "MLP",
                mlp,
                r"W' \sigma(W z + b) + b'",
                "The MLP of block $\\ell$ reads $z$; $\\sigma$ is any function, applied to each hidden unit.",
            ),
            Step(
                "Exchange",
                P,
                stacked(r"W \to P W, \quad b \to P b", r"W' \to W' P^{\top}"),
                "The permutation matrix $P$ exchanges the first two hidden units of block $\\ell$, with all that goes "
                "in and out of them.",
            ),
            Step(
                "Position updates",
                pair.updates,
                UPDATES,
                "Blocks $\\ell$ and $k$ have their weight updates at one position: this is `position_weight_update`.",
            ),
        ),
        steps=(
            Step(
                "Same function",
                same[0],
                stacked(r"W' P^{\top} \sigma(P W z + P b)", r"{} = W' \sigma(W z + b)"),
                "SymPy finds the same terms in another order, for any $z$ and any $\\sigma$. "
                + (
                    "There is no other pair of units."
                    if len(same) == 1
                    else f"It does so for each of the {len(same)} pairs of units, and any permutation is a sequence "
                    "of such exchanges."
                ),
            ),
            Step(
                "Same in the residual stream",
                in_the_stream,
                stacked(rf"{READ} - {READ_ALONE}", BIAS_FORMULA),
                "These contain neither $W$ nor $b$ nor $W'$, and later blocks get the same stream as before: the "
                "exchange leaves both as they are, in every block.",
            ),
            Step(
                "The update goes along",
                moved,
                r"\Delta W^\ell \to P\, \Delta W^\ell",
                "With $P W$ for $W$, the weight update comes out with its rows exchanged.",
            ),
            Step(
                "Within the block",
                within,
                r"\langle P \Delta W_i, P \Delta W_j \rangle = \langle \Delta W_i, \Delta W_j \rangle",
                "All updates of the block have the same rows exchanged, so their norms and their alignment with each "
                "other stay as they are.",
            ),
            Step(
                "Across blocks",
                change,
                stacked(*CHANGE),
                f"With ${U} = W (\\boldsymbol{{g}} - {F})$ in each block: the inner product changes, unless the two "
                "units are updated alike in one of the blocks or the right factors are perpendicular.",
            ),
            Step(
                "From one to zero",
                (before, after),
                stacked(
                    rf"\cos(\Delta W^\ell, \Delta W^k) = {before}",
                    rf"\cos(P \Delta W^\ell, \Delta W^k) = {after}",
                ),
                "Take two equal blocks whose updates change the first hidden unit only. They are aligned, until that "
                "unit of one of them is given another number.",
            ),
        ),
        result=change,
        latex=stacked(*CHANGE),
        arguments=arguments,
        shapes=alignment_across(out_features, in_features).shapes,
        must_vanish=must_vanish,
    )


def _exchange(size: int, pair: tuple[int, int]) -> sp.ImmutableMatrix:
    """Return the permutation matrix that exchanges two units."""
    return sp.ImmutableMatrix(sp.eye(size).elementary_row_op("n<->m", row1=pair[0], row2=pair[1]))


def _example(across: Derivation, P: sp.MatrixBase) -> tuple[sp.Expr, sp.Expr]:
    """Return the alignment of two equal blocks, before and after two hidden units of one are exchanged.

    Each updates its first hidden unit only: $f = e_1$, $g = 2 e_1$, and the first column of $W$ is $e_1$.
    """
    W, f, *_ = across.arguments.values()
    weight = sp.ImmutableMatrix(*W.shape, lambda i, k: int(i == k == 0))
    read_alone = sp.ImmutableMatrix(*f.shape, lambda k, _: int(k == 0))
    reads = (read_alone, 2 * read_alone)
    before, after = (
        put(across.result, *zip(across.arguments.values(), (first, *reads, weight, *reads), strict=True))
        for first in (weight, P * weight)
    )
    return before, after
