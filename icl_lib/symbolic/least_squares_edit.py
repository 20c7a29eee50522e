r"""One edit for more reads than it can serve exactly: ridge regression."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import gradient
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten
from icl_lib.symbolic.joint_weight_update import joint_weight_update
from icl_lib.symbolic.notation import IN, OUT, QUERIES, SAMPLE, latex, matrix, number, squared_norm, vector
from icl_lib.symbolic.weight_update import N

READS, CHANGES = matrix("R", IN, QUERIES), matrix(r"\Delta H", OUT, QUERIES)
GUARD = matrix("G", IN, SAMPLE)
RIDGE = sp.Symbol(r"\lambda", positive=True)


@cache
def least_squares_edit() -> Derivation:
    r"""Derive the edit that makes wanted changes as well as one matrix can, from its normal equations.

    $$\Delta V = \Delta H\, (\lambda I + R^\top R)^{-1} R^\top$$

    The columns of $R$ are what the map reads, and those of $\Delta H$ by how much its outputs should change. They may
    be as many as one likes. The ridge $\lambda$ is positive. A second quadratic term guards other reads, the columns of
    $G$, against any change.

    Source: this book. Without a ridge: Mazzawi et al. (arXiv 2510.08734).

    Shapes: the result, $\Delta V$, is a function of ``reads`` ``[in, queries]``, ``changes`` ``[out, queries]`` and
    ``ridge``.

    >>> import numpy as np
    >>> derivation = least_squares_edit()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([[1.0, 1.0]]), np.array([[2.0, 4.0]]), np.array(1.0))
    array([[2.]])
    """
    edit, slope = matrix(r"\Delta V"), matrix(r"\nabla\mathcal{L}(\Delta V)")
    value, nearby = (number(rf"\mathcal{{L}}({at})") for at in (edit.name, f"{edit.name} + N"))
    gram, small = READS * READS.T, RIDGE * sp.Identity(QUERIES) + READS.T * READS
    large = RIDGE * sp.Identity(IN) + gram

    def loss(of: sp.MatrixExpr) -> sp.Expr:
        return squared_norm(of * READS - CHANGES) / 2 + RIDGE * squared_norm(of) / 2

    result = CHANGES * sp.Inverse(small) * READS.T
    read, change = vector("r"), vector(r"\Delta h", OUT)
    of_one = result.subs(QUERIES, 1).xreplace({READS.subs(QUERIES, 1): read, CHANGES.subs(QUERIES, 1): change})
    one, plain = matrix(r"\Delta V_1"), matrix(r"\Delta V_0")
    guarded, guarded_slope = number(r"\mathcal{G}(\Delta V)"), matrix(r"\nabla\mathcal{G}(\Delta V)")
    loss_guarded, held = loss(edit) + squared_norm(edit * GUARD) / 2, matrix(r"\Delta V_G")
    both, with_guard = matrix("S", IN, IN), large + GUARD * GUARD.T
    V, Z_0, Z_C = joint_weight_update().arguments.values()
    exact = result.xreplace({RIDGE: sp.S.Zero, READS: Z_0, CHANGES: V * (Z_C - Z_0)})

    return Derivation(
        name="least_squares_edit",
        source="This book; without a ridge: Mazzawi et al. 2025 (arXiv 2510.08734)",
        assumptions=dict(
            loss=Step(
                "**Least squares.** The edit misses the wanted changes, the columns of "
                f"${latex(CHANGES)}$, as little as one matrix can. The ridge keeps it small.",
                Identity(value, loss(edit)),
            ),
        ),
        steps=dict(
            stationarity=Step(
                "**Stationarity.** At the minimum the gradient is zero.",
                Identity(slope, edit * large - CHANGES * READS.T),
                Asked(slope, sp.ZeroMatrix(OUT, IN)),
            ),
            normal_equations=Step(
                "**Normal equations.** The matrix on the left has an inverse, since the ridge is positive.",
                Asked(edit * large, CHANGES * READS.T),
            ),
            few_reads=Step(
                "**Few reads.** The inverse of a small matrix does as well: as many rows as there are reads.",
                Identity(small * READS.T, READS.T * large),
                Asked(edit, result),
            ),
            second_order=Step(
                "**Minimum.** A change $N$ raises the loss, so the minimum is the only one.",
                Asked(nearby - value, squared_norm(N * READS) / 2 + RIDGE * squared_norm(N) / 2),
            ),
            guard=Step(
                f"**Guard.** The columns of ${latex(GUARD)}$ are reads whose output should stay. They join the matrix "
                "on the left as reads with no wanted change.",
                Identity(guarded, loss_guarded),
                Identity(both, with_guard),
                Identity(guarded_slope, edit * both - CHANGES * READS.T),
                Identity(held, CHANGES * READS.T * sp.Inverse(both)),
                Identity(held * both, CHANGES * READS.T),
            ),
            one_read=Step(
                "**One read.** The edit is that of `output_update`, but for the ridge in the denominator.",
                Identity(one, change * read.T / (RIDGE + squared_norm(read))),
            ),
            no_ridge=Step(
                "**No ridge.** Where the reads are independent, the ridge may be zero. The edit is then that of "
                "`joint_weight_update`, and nothing is missed.",
                Identity(plain, V * (Z_C - Z_0) * sp.Inverse(Z_0.T * Z_0) * Z_0.T),
                Identity(plain * Z_0, V * (Z_C - Z_0)),
            ),
        ),
        unknown=edit,
        result=result,
        arguments={"reads": READS, "changes": CHANGES, "ridge": RIDGE},
        names={
            **{value: loss(edit), nearby: loss(edit + N), slope: gradient(loss(edit), edit)},
            **{
                guarded: loss_guarded,
                both: with_guard,
                guarded_slope: gradient(loss_guarded, edit),
                held: CHANGES * READS.T * sp.Inverse(with_guard),
            },
            **{one: of_one, plain: rewritten(exact, joint_weight_update().result)},
        },
    )
