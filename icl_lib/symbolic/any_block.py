r"""The rule for all blocks: patch the maps that read the stream, and add what the stream itself lacks."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import Applied, expanded, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, WIDTH, latex, matrix, vector
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "after Goldwaser et al. 2026 (arXiv 2511.17864), Theorem 1 and the definition of input controllability"
EXPERTS = sp.Symbol("e", integer=True, positive=True)


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
    maps = (matrix("V"), matrix("R", EXPERTS))
    edits = tuple(matrix(rf"\Delta {one.name}", one.rows) for one in maps)
    z_0, z_C, h_0, h_C = (
        vector(letter, size, index) for letter, size in (("z", IN), ("h", WIDTH)) for index in ("0", "C")
    )
    change = sp.MatrixSymbol(r"\Delta h", WIDTH, 1)
    updates = tuple(least.result.xreplace({W: one, a_0: z_0, a_C: z_C}) for one in maps)

    def mlp(*reads: sp.MatrixExpr) -> Applied:
        return Applied(r"\operatorname{MLP}", (WIDTH, 1), *reads)

    prompted, edited = sp.MatrixSymbol(r"T(C, x)", WIDTH, 1), sp.MatrixSymbol(r"T_{+\Delta V}(x)", WIDTH, 1)
    names = {
        **dict(zip(edits, updates, strict=True)),
        prompted: h_C + mlp(*(one * z_C for one in maps)),
        edited: h_0 + mlp(*((one + edit) * z_0 for one, edit in zip(maps, edits, strict=True))),
    }
    gap = rewritten(expanded((names[prompted] - names[edited]).xreplace(names)), h_C - h_0)

    return Derivation(
        name="any_block",
        source=SOURCE,
        assumptions=dict(
            block=Step(
                f"**The block with the context.** The MLP reads a vector ${latex(z_C)}$, such as the stream "
                f"${latex(h_C)}$ or a norm of it, through its inner maps alone. $V$ stands for each of them, any "
                "number. A router $R$ is one as well.",
                Identity(prompted, names[prompted]),
            ),
            edited_block=Step(
                "**The block without it, inner maps edited.** Every inner map has its weight update (`weight_update`, "
                f"with ${latex(z_0)}$ for ${latex(a_0)}$).",
                Identity(edited, names[edited]),
                *(Identity(edit, update) for edit, update in zip(edits, updates, strict=True)),
            ),
            effect=Step(
                f"**Same output.** The end of the block adds a vector ${latex(change)}$ to the stream.",
                Asked(edited + change, prompted),
            ),
            nonzero=Step("**Nonzero activation.** No edit of a map acts on zero.", Nonzero(z_0)),
        ),
        steps=dict(
            inner=Step(
                "**The inner maps return the same.** So do the gates of a mixture of experts, and the MLP returns the "
                "same, whatever function it is.",
                *(Identity((one + edit) * z_0, one * z_C) for one, edit in zip(maps, edits, strict=True)),
            ),
            left_over=Step("**What is left over.** The MLP cancels.", Identity(prompted - edited, gap)),
            solve=Step(
                "**The change that must be added.** It is the difference of the residual streams.",
                Asked(change, rewritten(solved(change - gap, change), h_C - h_0)),
            ),
            parallel=Step(
                "**Parallel blocks.** Where the MLP reads the stream as it enters the block, it reads the same with "
                "and without the context once the blocks below are patched. Then the inner edits are zero.",
                Identity(updates[0].xreplace({z_C: z_0}), sp.ZeroMatrix(OUT, IN)),
            ),
        ),
        unknown=change,
        result=gap,
        statement=Asked(change, h_C - h_0),
        arguments={"h_without": h_0, "h_with": h_C},
        names=names,
    )
