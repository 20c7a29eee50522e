r"""The bias update: the part of the context's effect that a skip connection carries past the weights."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import Applied, expanded, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, latex, matrix, vector
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "Dherin et al. 2025 (arXiv 2507.16003), version 1, the appendix on skip connections; version 4, Theorem C.2"
ACTIVATION = r"\sigma"


@cache
def bias_update() -> Derivation:
    r"""Derive the bias edit of a block with skip connections around its contextual layer and its MLP.

    $$T(C, x) = x + A(C, x) + W' \sigma(W A(C, x) + b) + b' \qquad\Longrightarrow\qquad \Delta b' = a_C - a_0$$

    $W$ has its weight update. The activation $\sigma$ may be any function: the proof uses only that it returns equal
    values for equal arguments.

    Source: Dherin et al. (arXiv 2507.16003), version 1, the appendix on skip connections; version 4, Theorem C.2.

    Shapes: the result, $\Delta b'$ ``[in]``, is a function of ``a_without`` ``[in]`` and ``a_with`` ``[in]``.

    >>> derivation = bias_update()
    >>> derivation.check()
    True
    >>> derivation.result
    -\boldsymbol{a}_{0} + \boldsymbol{a}_{C}
    """
    least = weight_update()
    W, a_0, a_C = least.arguments.values()
    edit, x = least.unknown, vector("x")
    bias, bias_edit, prompted, edited = (
        matrix(name, IN, 1)
        for name in ("b'", r"\Delta b'", r"T_{W,\,b'}(C, x)", r"T_{W + \Delta W,\,b' + \Delta b'}(C \setminus Y, x)")
    )
    outer_weight, hidden_bias = matrix("W'", IN, OUT), matrix("b", OUT, 1)

    def block(weight: sp.MatrixExpr, read: sp.MatrixExpr, output_bias: sp.MatrixExpr) -> sp.MatrixExpr:
        return x + read + outer_weight * Applied(ACTIVATION, (OUT, 1), weight * read + hidden_bias) + output_bias

    prompted, edited = (
        matrix(r"T_{W,\,b'}(C, x)", IN, 1),
        matrix(r"T_{W + \Delta W,\,b' + \Delta b'}(C \setminus Y, x)", IN, 1),
    )
    names = {edit: least.result, prompted: block(W, a_C, bias), edited: block(W + edit, a_0, bias + bias_edit)}
    gap = rewritten(expanded((edited - prompted).xreplace(names).xreplace(names)), a_0 - a_C + bias_edit)
    update = rewritten(solved(gap, bias_edit), a_C - a_0)

    return Derivation(
        name="bias_update",
        source=SOURCE,
        assumptions=dict(
            block=Step(
                f"**The block with its context.** The query ${latex(x)}$ and the output ${latex(a_C)}$ of the "
                "contextual layer skip the MLP. The activation $\\sigma$ may be any function.",
                Identity(prompted, names[prompted]),
            ),
            edited_block=Step(
                f"**The edited block without a part $Y$ of it.** The contextual layer outputs ${latex(a_0)}$. The "
                f"first weights have their weight update (`weight_update`), which needs ${latex(a_0)} \\neq "
                "\\boldsymbol{0}$.",
                Identity(edited, names[edited]),
                Identity(edit, least.result),
            ),
            effect=Step(
                "**Same output.** The edited block without the context computes the same output as the block with it.",
                Asked(edited, prompted),
            ),
        ),
        steps=dict(
            reads=reads_the_same((W + edit) * a_0 + hidden_bias, W * a_C + hidden_bias),
            left_over=Step(
                f"**What is left over.** In the difference of the two outputs ${latex(x)}$, $b'$ and the whole MLP "
                "cancel.",
                Identity(edited - prompted, gap),
            ),
            solve=Step("**Bias update.** The difference vanishes for exactly one bias edit.", Asked(bias_edit, update)),
        ),
        unknown=bias_edit,
        result=update,
        statement=Asked(bias_edit, a_C - a_0),
        arguments={"a_without": a_0, "a_with": a_C},
        names=names,
    )


def reads_the_same(edited: sp.MatrixExpr, prompted: sp.MatrixExpr) -> Step:
    """Return the step in which the edited map gives the activation what it reads with the context."""
    return Step(
        "**The activation reads the same.** So it returns the same, whatever function it is.",
        Identity(edited, prompted),
    )
