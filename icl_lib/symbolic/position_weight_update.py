r"""The weight update of a residual block for any one position of the sequence."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import Applied, after
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Minimise, Nonzero, Step, is_least, rewritten
from icl_lib.symbolic.notation import IN, OUT, latex, matrix, rank_one, squared_norm, vector
from icl_lib.symbolic.weight_update import weight_update

SOURCE = "Innocenti, Achour 2025 (arXiv 2512.11255), version 1, Theorem 1"
ACTIVATION, NORM = r"\sigma", r"\operatorname{LN}'"
POSITION = "i"


class ResidualBlock:
    r"""The block $T(C, x)_i = h_i + W' \sigma(W \operatorname{LN}'(h_i) + b) + b'$, in symbols.

    ``c``, ``x``: the residual stream at position $i$ and of the query; ``A``, ``A_0``: what attention adds to them;
    ``h``, ``h_0``: the sums; ``g``, ``f``: what the MLP reads from these.
    """

    def __init__(self, position: str = POSITION) -> None:
        self.W, self.W_out = matrix("W"), matrix("W'", IN, OUT)
        self.b, self.b_out = sp.MatrixSymbol("b", OUT, 1), sp.MatrixSymbol("b'", IN, 1)
        self.x, self.c = vector("x"), vector("c", index=position)
        self.A_0, self.A = vector("A", index="0"), vector("A", index=position)
        self.h_0, self.h = vector("h", index="0"), vector("h", index=position)
        self.f, self.g = vector("f"), vector("g", index=position)
        self.edit = matrix(rf"\Delta W_{position}")
        self.bias_edit = sp.MatrixSymbol(rf"\Delta b'_{position}", IN, 1)
        self.prompted = sp.MatrixSymbol(rf"T(C, x)_{position}", IN, 1)
        self.edited = sp.MatrixSymbol(rf"T_{{W + \Delta W_{position},\, b' + \Delta b'_{position}}}(x)", IN, 1)
        self.names = {
            self.prompted: self.h + self.W_out * self.active(self.W, self.g) + self.b_out,
            self.edited: self.h_0 + self.W_out * self.active(self.W + self.edit, self.f) + self.b_out + self.bias_edit,
            self.h: self.c + self.A,
            self.h_0: self.x + self.A_0,
            self.g: Applied(NORM, (IN, 1), self.h),
            self.f: Applied(NORM, (IN, 1), self.h_0),
        }

    def active(self, weight: sp.MatrixExpr, read: sp.MatrixExpr) -> Applied:
        """Return the hidden activation: any function of what the first map returns."""
        return Applied(ACTIVATION, (OUT, 1), weight * read + self.b)

    def assumptions(self) -> dict[str, Step]:
        """Return the block with the context, the edited block without it, and what is asked of the edits."""
        return dict(
            block=Step(
                "**The block at position $i$, with the context.** The residual stream of token $i$ is "
                f"${latex(self.c)}$, attention adds ${latex(self.A)}$ to it, and the MLP reads ${latex(self.g)}$. The "
                "norm and the activation $\\sigma$ may be any functions.",
                Identity(self.h, self.names[self.h]),
                Identity(self.g, self.names[self.g]),
                Identity(self.prompted, self.names[self.prompted]),
            ),
            edited_block=Step(
                f"**The edited block, fed the query alone.** The stream is the query's, ${latex(self.x)}$. Without the "
                f"context attention adds ${latex(self.A_0)}$, and the MLP reads ${latex(self.f)}$.",
                Identity(self.h_0, self.names[self.h_0]),
                Identity(self.f, self.names[self.f]),
                Identity(self.edited, self.names[self.edited]),
            ),
            effect=Step(
                "**Same output.** The edited block, fed the query alone, computes what the block computes at position "
                "$i$ with the context. This is asked for every $\\sigma$ and $W'$.",
                Asked(self.edited, self.prompted),
            ),
            nonzero=Step(
                f"**Nonzero activation.** If ${latex(self.f)}$ were zero, every edit would map it to zero.",
                Nonzero(self.f),
            ),
        )


@cache
def position_weight_update() -> Derivation:
    r"""Derive the weight edit with which a residual block, fed the query alone, computes its output at one position.

    $$\Delta W_i = \frac{W (g_i - f)\, f^\top}{\|f\|^2}, \qquad g_i = \operatorname{LN}'(h_i), \quad
    f = \operatorname{LN}'(h_0)$$

    $h_i = c_i + A_i$ is the residual stream at position $i$ behind attention, $h_0 = x + A_0$ that of the query alone.
    The norm may be any function of the stream: layer norm is one, and so is none at all. That all the block needs is
    $(W + \Delta W_i) f = W g_i$ comes out; the least such edit is that of :func:`~icl_lib.symbolic.weight_update`.

    Source: Innocenti and Achour (arXiv 2512.11255), version 1, Theorem 1; least norm: Dherin et al., version 4,
    Theorem 2.3.

    Shapes: the result, $\Delta W_i$, is a function of ``W`` ``[out, in]``, ``f`` ``[in]`` and ``g_i`` ``[in]``.

    >>> import numpy as np
    >>> derivation = position_weight_update()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    array([[1., 1.],
           [0., 0.]])
    """
    block, least = ResidualBlock(), weight_update()
    W, f, g, edit = block.W, block.f, block.g, block.edit
    _, a_0, a_C = least.arguments.values()
    now, then = block.active(W + edit, f), block.active(W, g)
    gap = block.names[block.edited] - block.names[block.prompted]

    # The gap is affine in W', so it vanishes for every W' only if what W' multiplies does.
    rewritten(after(gap, block.W_out), now - then)
    update = least.result.xreplace({a_0: f, a_C: g})

    return Derivation(
        name="position_weight_update",
        source=SOURCE,
        assumptions=dict(
            **block.assumptions(),
            least_norm=Step(
                "**Least norm.** Many edits do this. We ask for the one that changes the weights least.",
                Minimise(squared_norm(edit) / 2),
            ),
        ),
        steps=dict(
            gap=Step(
                "**The difference of the outputs.** $b'$ cancels. The rest is affine in $W'$.",
                Identity(
                    block.edited - block.prompted,
                    block.h_0 - block.h + block.bias_edit + block.W_out * now - block.W_out * then,
                ),
            ),
            any_outer_weights=Step(
                "**For every $W'$.** The edits do not depend on $W'$, and the difference must vanish for every $W'$. "
                "So what $W'$ multiplies must vanish.",
                Asked(now, then),
            ),
            any_activation=Step(
                "**For every $\\sigma$.** The identity is one of them, so its arguments must be equal, and $b$ "
                "cancels. Then every $\\sigma$ returns equal values. This is the constraint of `weight_update`, with "
                f"${latex(f)}$ for ${latex(a_0)}$ and ${latex(g)}$ for ${latex(a_C)}$.",
                Asked((W + edit) * f, W * g),
            ),
            formula=Step(
                "**Weight update of a position.** The edit of least norm is the one derived there. The row is the same "
                "for all positions.",
                Asked(edit, update),
            ),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, rank_one(W * (g - f), f)),
        arguments={"W": W, "f": f, "g_i": g},
        names=block.names,
        solution={block.bias_edit: block.h - block.h_0},
        beyond=lambda candidate: (is_least(candidate, f),),
    )
