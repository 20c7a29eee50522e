r"""The updates of a residual block that stand for the context at any one position of the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.derivation import Derivation, Step, rewritten
from icl_lib.symbolic.least_norm import two_by_two_minors
from icl_lib.symbolic.notation import A_WITH, A_WITHOUT, first_of, latex, matrix, put, squared_norm, stacked, vector
from icl_lib.symbolic.residual_block import (
    ACTIVATION,
    ALONE,
    ATTENDED,
    EDITED,
    READ,
    READ_ALONE,
    STREAM,
    residual_block,
)
from icl_lib.symbolic.skip_connection import bias_update

SOURCE = "Innocenti, Achour 2025 (arXiv 2512.11255), Theorem 1"
WEIGHT_FORMULA = rf"\Delta W_i = \frac{{W ({READ} - {READ_ALONE})\, {READ_ALONE}^{{\top}}}}{{\|{READ_ALONE}\|^2}}"
BIAS_FORMULA = rf"\Delta b'_i = ({ATTENDED} - {ALONE}) + ({STREAM} - x)"


@lru_cache(maxsize=None, typed=True)
def position_weight_update(out_features: int, in_features: int, layer_norm: str = "symbol") -> Derivation:
    r"""Derive the weight edit by which a residual block answers to the query alone as it did at one position.

    $$\Delta W_i = \frac{W (g_i - f)\, f^\top}{\|f\|^2}, \qquad g_i = \operatorname{LN}'(A_i + s_i), \quad
    f = \operatorname{LN}'(A_0 + x)$$

    Position $i$ has the residual stream $s_i = (C, x)_i$, to which attention adds $A_i$; to the query alone it adds
    $A_0$. That all the block asks of the edit is $(W + \Delta W_i) f = W g_i$ comes out, with $\sigma$ and $W'$ left
    open; the smallest such edit is that of :func:`~icl_lib.symbolic.weight_update`, rank one included.

    Args:
        layer_norm: ``"symbol"`` leaves $\operatorname{LN}'$ any function, which may mix all entries;
            ``"written out"`` takes :func:`~icl_lib.symbolic.layer_norm`, with $\gamma$, $\beta$ and $\varepsilon$.

    Source: Innocenti and Achour, Theorem 1; least norm: Dherin et al., v4, Theorem 2.3.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $\Delta W_i$, is a function of ``W`` ``[out, in]``,
    ``f`` ``[in]`` and ``g_i`` ``[in]``; written out, of ``W``, then ``x``, ``A_0``, ``s_i``, ``A_i``, ``gain`` and
    ``shift``, all ``[in]``, and ``eps``, an array without dimensions.

    Raises `ValueError` for another ``layer_norm`` and for a size that is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = position_weight_update(2, 2)
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]))
    array([[1., 1.],
           [0., 0.]])
    """
    block = residual_block(out_features, in_features, layer_norm)
    least, W = block.least, block.weight
    a0, aC = (least.arguments[name] for name in ("a_without", "a_with"))
    edit, bias_edit = matrix(r"\Delta W", out_features, in_features), vector(r"\Delta b'", in_features)

    gap = block.gap(edit, bias_edit)
    # The outer weights enter linearly: this is all that the first of them multiplies, in the first entry.
    first_part = sp.diff(gap[0], block.outer_weight[0])
    now, then = block.activation_reads(edit)
    asked = rewritten(now - then, block.as_read(least.step("Effect").expression))
    rewritten(first_part.replace(ACTIVATION, lambda read: read), asked[0])

    f, g = vector("f", in_features), vector("g", in_features, "i")
    outer_product = put(least.step("Outer product").expression, (a0, f))
    if block.norm:
        reads = {"x": block.query, "A_0": block.alone, "s_i": block.stream, "A_i": block.attended, **block.norm}
        update = block.as_read(least.result)
    else:
        reads = {"f": f, "g_i": g}
        update = put(least.result, (a0, f), (aC, g))
    shapes = {"W": "out in", **dict.fromkeys(reads, "in"), "return": "out in"}

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        here = put(candidate, (f, block.read_alone), (g, block.read))
        asked_of_least = least.must_vanish(here)
        # With the bias update as well, nothing of the block may be left over.
        bias = block.stream + block.attended - block.query - block.alone
        return {
            "effect of the block": block.named(block.left_over(here, bias)),
            **{name: block.named(block.as_read(asked_of_least[name])) for name in ("stationarity", "rank one")},
        }

    return Derivation(
        name="position_weight_update",
        source=SOURCE,
        assumptions=(
            *block.assumptions(edit, bias_edit),
            Step(
                "Smallest edit",
                squared_norm(edit) / 2,
                r"\text{minimise}\quad \tfrac12 \|\Delta W_i\|_F^2",
                "Many edits have this effect; we ask for the one that changes the weights least.",
            ),
        ),
        steps=(
            Step(
                "Gap",
                gap,
                stacked(
                    rf"{EDITED} - T(C, x)_i",
                    rf"{{}} = x + {ALONE} - {STREAM} - {ATTENDED} + \Delta b'_i",
                    rf"{{}} + W' \sigma\bigl((W + \Delta W_i)\, {READ_ALONE} + b\bigr)",
                    rf"{{}} - W' \sigma(W {READ} + b)",
                ),
                "We subtract the two sides of the effect; $b'$ cancels.",
            ),
            Step(
                "For any outer weights",
                first_part,
                stacked(
                    rf"\sigma\bigl((W + \Delta W_i)\, {READ_ALONE} + b\bigr)",
                    rf"{{}} = \sigma(W {READ} + b)",
                ),
                "The gap is linear in $W'$, so it vanishes for every $W'$ only if what each entry of $W'$ multiplies "
                "does; SymPy finds that as the derivative by the entry.",
            ),
            Step(
                "For any activation",
                asked,
                rf"(W + \Delta W_i)\, {READ_ALONE} = W {READ}",
                "With the identity for $\\sigma$, SymPy finds that this is necessary, and then every other $\\sigma$ "
                f"returns the same too. It is what `weight_update` starts from, with ${READ_ALONE}$ for ${A_WITHOUT}$ "
                f"and ${READ}$ for ${A_WITH}$.",
            ),
            Step(
                "Rank one",
                sp.ImmutableMatrix(two_by_two_minors(outer_product)),
                rf"\Delta W_i = \boldsymbol{{\lambda}}_i\, {READ_ALONE}^{{\top}}",
                "So the smallest edit is a column times a row, as derived there, and each of its $2 \\times 2$ minors "
                "is zero.",
            ),
            Step(
                "Position update",
                update,
                WEIGHT_FORMULA,
                "The multipliers found there make the column; the row does not depend on the position.",
            ),
        ),
        result=update,
        latex=WEIGHT_FORMULA,
        arguments={"W": W, **reads},
        shapes=shapes | {"eps": ""} if block.norm else shapes,
        must_vanish=must_vanish,
    )


@lru_cache(maxsize=None, typed=True)
def position_bias_update(out_features: int, in_features: int, layer_norm: str = "symbol") -> Derivation:
    r"""Derive the edit of the output bias that goes with the weight edit of the same position.

    $$\Delta b'_i = (A_i - A_0) + (s_i - x)$$

    It takes over what goes past the MLP, which is the change of attention and, at an earlier position, the other token
    itself. At the last position $s_N = x$, and it is :func:`~icl_lib.symbolic.bias_update`.

    Args:
        layer_norm: as for :func:`~icl_lib.symbolic.position_weight_update`; the result is the same with both.

    Source: Innocenti and Achour, Theorem 1.

    Shapes: $W$ is ``out_features`` × ``in_features``. The result, $\Delta b'_i$ ``[in]``, is a function of ``x``,
    ``A_0``, ``s_i`` and ``A_i``, all ``[in]``.

    Raises `ValueError` for another ``layer_norm`` and for a size that is not a whole number of at least 1.

    >>> derivation = position_bias_update(3, 2)
    >>> derivation.check()
    True
    >>> derivation.result[0]
    -A_{0,1} + A_{i,1} + s_{i,1} - x_{1}
    """
    block = residual_block(out_features, in_features, layer_norm)
    weight_edit, edit = block.as_read(block.least.result), vector(r"\Delta b'", in_features)
    now, then = block.activation_reads(weight_edit)

    gap = block.left_over(weight_edit, edit)
    if gap.has(ACTIVATION):
        raise ArithmeticError(f"{ACTIVATION} reads something else with the weight update than with the context")
    update = edit.xreplace(sp.solve(list(gap), list(edit)))

    skip = bias_update(out_features, in_features)
    a0, aC = (skip.arguments[name] for name in ("a_without", "a_with"))
    without_position = put(skip.result, (a0, block.alone), (aC, block.attended))
    at_the_last = rewritten(put(update, (block.stream, block.query)), without_position)

    def must_vanish(candidate: Any) -> Mapping[str, Any]:
        return {"effect": put(gap, (edit, candidate))}

    arguments = {"x": block.query, "A_0": block.alone, "s_i": block.stream, "A_i": block.attended}
    return Derivation(
        name="position_bias_update",
        source=SOURCE,
        assumptions=(
            *block.assumptions(weight_edit, edit),
            Step(
                "Weight update",
                weight_edit,
                WEIGHT_FORMULA,
                "The first layer has the update of this position already: this is `position_weight_update`.",
            ),
        ),
        steps=(
            Step(
                "What σ reads",
                (now, then),
                stacked(rf"(W + \Delta W_i)\, {READ_ALONE} + b", rf"{{}} = W {READ} + b"),
                "With the weight update the activation reads the same as at position $i$ with the context, in every "
                f"one of the {out_features} hidden features, so it returns the same, whatever function it is.",
            ),
            Step(
                "What is left",
                gap,
                f"{latex(gap[0])} = 0",
                "We subtract the two sides of the effect: $b'$ and all of the MLP cancel. "
                f"{first_of(len(gap), 'entry', 'entries')}",
            ),
            Step(
                "Bias update",
                update,
                f"{latex(edit[0])} = {latex(update[0])}",
                "SymPy solves for the bias: it takes over what attention adds and, at an earlier position, the other "
                "token.",
            ),
            Step(
                "At the last position",
                at_the_last,
                stacked(rf"{STREAM} = x", rf"\Delta b'_i = {ATTENDED} - {ALONE}"),
                "The last token is the query, so nothing remains but the change of attention; this is `bias_update`, "
                "the result of Dherin et al.",
            ),
        ),
        result=update,
        latex=BIAS_FORMULA,
        arguments=arguments,
        shapes={**dict.fromkeys(arguments, "in"), "return": "in"},
        must_vanish=must_vanish,
    )
