r"""How heads of linear attention with merged keys and queries learn from white inputs: a logistic curve."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import latex, number

FEATURES, COUNT, CURVATURE = (sp.Symbol(name, positive=True) for name in ("D", "N", r"\kappa"))
FIRST, TIME, SIGMA = sp.Symbol("w", positive=True), number("t"), number(r"\sigma")
CORNER, TRACE = number("v"), number("u")
LOSS, START = number("L"), number(r"\sigma(0)")
CORNER_SPEED, TRACE_SPEED, SPEED = (number(rf"\dot{{{name}}}") for name in ("v", "u", r"\sigma"))


@cache
def merged_time_course() -> Derivation:
    r"""Derive how the strength of merged heads grows under gradient flow, from white inputs.

    $$\sigma(t) = \frac{e^{2 \sqrt D\, t}}{\kappa\, (e^{2 \sqrt D\, t} - 1) + \sqrt D / w^2}, \qquad
    \kappa = 1 + \frac{1 + D}{N}$$

    A head writes with a number $v$ and compares inputs with the matrix $u I / \sqrt D$, and starts with $v = u = w$.
    The flow of the loss makes the two grow together. One over $\sigma = v u / \sqrt D$ obeys a linear equation.

    Source: Zhang et al. 2025 (arXiv 2501.16265), version 2, with the time constant 1.

    Shapes: the result, $\sigma(t)$ ``[]``, is a function of ``t``, ``D``, ``N`` and ``w``, all ``[]``.

    >>> import numpy as np
    >>> derivation = merged_time_course()
    >>> derivation.check()
    True
    >>> start = derivation.lambdify()(np.array(0.0), np.array(4.0), np.array(10.0), np.array(0.2))
    >>> round(float(start), 12)  # w² / √D
    0.02
    """
    root = sp.sqrt(FEATURES)
    curvature = 1 + (1 + FEATURES) / COUNT
    loss = FEATURES * (1 - 2 * SIGMA + CURVATURE * SIGMA**2)
    of_weights = loss.xreplace({SIGMA: CORNER * TRACE / root})
    pull = root * (1 - CURVATURE * CORNER * TRACE / root)
    speeds = {
        speed: rewritten(-of_weights.diff(by) / 2, pull * other)
        for speed, by, other in ((CORNER_SPEED, CORNER, TRACE), (TRACE_SPEED, TRACE, CORNER))
    }
    # One over σ is the constant κ plus what decays; σ(0) is w² / √D.
    decay = sp.exp(-2 * root * TIME)
    inverse = CURVATURE + (root / FIRST**2 - CURVATURE) * decay
    growth = sp.exp(2 * root * TIME)
    formula = rewritten(1 / inverse, growth / (CURVATURE * (growth - 1) + root / FIRST**2))
    result = formula.xreplace({CURVATURE: curvature})

    return Derivation(
        name="merged_time_course",
        source="Zhang et al. 2025 (arXiv 2501.16265), version 2",
        assumptions=dict(
            loss=Step(
                "**Loss.** With white inputs and a multiple of the identity the loss of `one_layer_optimum` is this.",
                Identity(LOSS, loss),
                Identity(CURVATURE, curvature),
            ),
            weights=Step(
                f"**Weights.** A head writes with the number ${latex(CORNER)}$, and compares inputs with a multiple of "
                f"the identity, of norm ${latex(TRACE)}$. Both start at ${latex(FIRST)}$, and so they stay equal.",
                Asked(SIGMA, CORNER * TRACE / root),
                Identity(START, FIRST**2 / root),
            ),
            flow=Step(
                "**Gradient flow.** Both go down the half of the loss.",
                Identity(CORNER_SPEED, speeds[CORNER_SPEED]),
                Identity(TRACE_SPEED, speeds[TRACE_SPEED]),
            ),
            nonzero=Step("**Something to start from.** Zero stays zero.", Nonzero(FIRST, COUNT)),
        ),
        steps=dict(
            together=Step(
                "**They grow together.** Each grows with the other, as long as the strength is small.",
                Asked(CORNER_SPEED, root * (1 - CURVATURE * SIGMA) * TRACE),
                Asked(TRACE_SPEED, root * (1 - CURVATURE * SIGMA) * CORNER),
            ),
            strength=Step(
                "**The strength.** The rule of the product gives its speed.",
                Asked(SPEED, (CORNER_SPEED * TRACE + CORNER * TRACE_SPEED) / root),
                Asked(SPEED, 2 * root * SIGMA * (1 - CURVATURE * SIGMA)),
            ),
            inverse=Step(
                "**One over it.** The inverse has a linear equation: it goes to a constant, at a constant rate.",
                Asked(-SPEED / SIGMA**2, -2 * root * (1 / SIGMA - CURVATURE)),
                Asked(1 / SIGMA, inverse),
            ),
            formula=Step("**Formula.** So the strength is a logistic curve.", Asked(SIGMA, formula)),
            end=Step(
                "**End.** It goes to the best layer, which `one_layer_optimum` gives for white inputs.",
                Identity(1 / CURVATURE, COUNT / (COUNT + FEATURES + 1)),
            ),
        ),
        unknown=SIGMA,
        result=result,
        statement=Asked(SIGMA, formula),
        arguments={"t": TIME, "D": FEATURES, "N": COUNT, "w": FIRST},
        names={
            LOSS: loss,
            CURVATURE: curvature,
            START: result.subs(TIME, 0),
            SPEED: result.diff(TIME),
            **speeds,
        },
        solution={CORNER: sp.sqrt(root * result), TRACE: sp.sqrt(root * result)},
    )
