r"""The rule for all blocks: patch the maps that read the stream, and add what the stream itself lacks."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import Applied, expanded, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, WIDTH, latex, matrix, vector
from icl_lib.symbolic.weight_update import weight_update

MAPS = matrix("V"), matrix("R", sp.Symbol("e", integer=True, positive=True))
PROMPTED, EDITED, CHANGE = (matrix(name, WIDTH, 1) for name in (r"T(C, x)", r"T_{+\Delta V}(x)", r"\Delta h"))
Z_0, Z_C, H_0, H_C = (vector(letter, size, k) for letter, size in (("z", IN), ("h", WIDTH)) for k in "0C")


@cache
def any_block() -> Derivation:
    r"""Derive what a block of any architecture needs: an edit of each inner map, and the change of the stream.

    $$h_C + \operatorname{MLP}(V z_C, R z_C)
    = h_0 + \operatorname{MLP}\bigl((V + \Delta V) z_0, (R + \Delta R) z_0\bigr) + \Delta h,
    \qquad \Delta h = h_C - h_0$$

    The MLP may be any function of what its inner maps return: gated, with a norm behind it, or a mixture of experts,
    whose router $R$ is one more map that reads $z$. $V$ stands for any number of inner maps. Each map has its
    :func:`~icl_lib.symbolic.weight_update`. What remains is the difference of the residual stream, which the end of the
    block must add: :func:`~icl_lib.symbolic.output_update`, :func:`~icl_lib.symbolic.scale_update`,
    :func:`~icl_lib.symbolic.turning_update` and :func:`~icl_lib.symbolic.expert_updates` are ways to do so.

    Source: after Goldwaser et al. (arXiv 2511.17864), Theorem 1 and the definition of input controllability.

    Shapes: the result, $\Delta h$ ``[dim]``, is a function of ``h_without`` ``[dim]`` and ``h_with`` ``[dim]``.

    >>> derivation = any_block()
    >>> derivation.check()
    True
    >>> derivation.result
    -\boldsymbol{h}_{0} + \boldsymbol{h}_{C}
    """
    least = weight_update()
    W, a_0, a_C = least.arguments.values()
    edits = {
        matrix(rf"\Delta {one.name}", one.rows): least.result.xreplace({W: one, a_0: Z_0, a_C: Z_C}) for one in MAPS
    }
    edited = tuple(one + edit for one, edit in zip(MAPS, edits, strict=True))
    names = {**edits, PROMPTED: H_C + _mlp(one * Z_C for one in MAPS), EDITED: H_0 + _mlp(one * Z_0 for one in edited)}
    gap = rewritten(expanded((names[PROMPTED] - names[EDITED]).xreplace(names)), H_C - H_0)

    return Derivation(
        name="any_block",
        source="after Goldwaser et al. 2026 (arXiv 2511.17864), Theorem 1 and the definition of input controllability",
        assumptions=dict(
            block=Step(
                f"**The block with the context.** The MLP reads a vector ${latex(Z_C)}$, such as the stream "
                f"${latex(H_C)}$ or a norm of it, through its inner maps alone. $V$ stands for each of them, any "
                "number. A router $R$ is one as well.",
                Identity(PROMPTED, names[PROMPTED]),
            ),
            edited_block=Step(
                "**The block without it, inner maps edited.** Every inner map has its weight update (`weight_update`, "
                f"with ${latex(Z_0)}$ for ${latex(a_0)}$).",
                Identity(EDITED, names[EDITED]),
                *(Identity(edit, update) for edit, update in edits.items()),
            ),
            effect=Step(
                f"**Same output.** The end of the block adds a vector ${latex(CHANGE)}$ to the stream.",
                Asked(EDITED + CHANGE, PROMPTED),
            ),
            nonzero=Step("**Nonzero activation.** No edit of a map acts on zero.", Nonzero(Z_0)),
        ),
        steps=dict(
            inner=Step(
                "**The inner maps return the same.** So do the gates of a mixture of experts, and the MLP returns the "
                "same, whatever function it is.",
                *(Identity(new * Z_0, one * Z_C) for new, one in zip(edited, MAPS, strict=True)),
            ),
            left_over=Step("**What is left over.** The MLP cancels.", Identity(PROMPTED - EDITED, gap)),
            solve=Step(
                "**The change that must be added.** It is the difference of the residual streams.",
                Asked(CHANGE, rewritten(solved(CHANGE - gap, CHANGE), H_C - H_0)),
            ),
            parallel=Step(
                "**Parallel blocks.** Where the MLP reads the stream as it enters the block, it reads the same with "
                "and without the context once the blocks below are patched. Then the inner edits are zero.",
                Identity(least.result.xreplace({W: MAPS[0], a_0: Z_0, a_C: Z_0}), sp.ZeroMatrix(OUT, IN)),
            ),
        ),
        unknown=CHANGE,
        result=gap,
        statement=Asked(CHANGE, H_C - H_0),
        arguments={"h_without": H_0, "h_with": H_C},
        names=names,
    )


def _mlp(reads: Iterable[sp.MatrixExpr]) -> Applied:
    return Applied(r"\operatorname{MLP}", (WIDTH, 1), *reads)
