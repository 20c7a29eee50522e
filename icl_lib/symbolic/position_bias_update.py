r"""The bias update of a residual block for any one position of the sequence."""

from __future__ import annotations

from functools import cache

from icl_lib.symbolic.algebra import expanded, solved
from icl_lib.symbolic.bias_update import bias_update, reads_the_same
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten
from icl_lib.symbolic.notation import latex
from icl_lib.symbolic.position_weight_update import SOURCE, ResidualBlock, position_weight_update


@cache
def position_bias_update() -> Derivation:
    r"""Derive the edit of the output bias that belongs to the weight edit of the same position.

    $$\Delta b'_i = h_i - h_0 = (c_i - x) + (A_i - A_0)$$

    It carries what skips the MLP: the change of the attention output and, at an earlier position, the other token's
    residual stream. At the last position $c_i = x$, and it is :func:`~icl_lib.symbolic.bias_update`.

    Source: Innocenti and Achour (arXiv 2512.11255), version 1, Theorem 1.

    Shapes: the result, $\Delta b'_i$ ``[in]``, is a function of ``x``, ``A_0``, ``c_i`` and ``A_i``, all ``[in]``.

    >>> derivation = position_bias_update()
    >>> derivation.check()
    True
    >>> import numpy as np
    >>> derivation.lambdify()(*(np.array([value]) for value in (1.0, 2.0, 10.0, 20.0)))
    array([27.])
    """
    block, weights, skip = ResidualBlock(), position_weight_update(), bias_update()
    W, f, g, edit, bias_edit = block.W, block.f, block.g, block.edit, block.bias_edit
    names = {edit: weights.result, **block.names}

    # The weight update is put in, but f and g_i keep their names: σ then reads the same on both sides.
    gap = (block.names[block.edited] - block.names[block.prompted]).xreplace({edit: weights.result})
    remaining = rewritten(expanded(gap), block.h_0 - block.h + bias_edit)
    in_streams = rewritten(solved(remaining, bias_edit), block.h - block.h_0)
    update = (block.c - block.x) + (block.A - block.A_0)
    at_the_query = skip.result.xreplace(dict(zip(skip.arguments.values(), (block.A_0, block.A), strict=True)))

    return Derivation(
        name="position_bias_update",
        source=SOURCE,
        assumptions=dict(
            **block.assumptions(),
            weight_update=Step(
                "**Weight update.** The first map has the weight update of this position (`position_weight_update`).",
                Identity(edit, weights.result),
            ),
        ),
        steps=dict(
            reads=reads_the_same((W + edit) * f + block.b, W * g + block.b),
            left_over=Step(
                "**What is left over.** In the difference of the outputs $b'$ and the whole MLP cancel.",
                Identity(block.edited - block.prompted, remaining),
            ),
            solve=Step(
                "**Bias update of a position.** The difference vanishes for exactly one bias edit. It contains the "
                "change of the attention output and, at an earlier position, the difference of the two tokens' "
                "streams.",
                Asked(bias_edit, in_streams, update),
            ),
            last_position=Step(
                f"**At the query.** There ${latex(block.c)}$ is ${latex(block.x)}$, and the formula is that of "
                "`bias_update`.",
                Identity(update.xreplace({block.c: block.x}), at_the_query),
            ),
        ),
        unknown=bias_edit,
        result=update,
        statement=Asked(bias_edit, in_streams),
        arguments={"x": block.x, "A_0": block.A_0, "c_i": block.c, "A_i": block.A},
        names=names,
    )
