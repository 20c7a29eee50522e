r"""A layer of linear self-attention moves the target of each token as a step of gradient descent would."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import IN, OUT, QUERIES, WIDTH, latex, matrix, number, squared_norm, vector

X, Y = matrix("X", IN, QUERIES), matrix("Y", OUT, QUERIES)
TOKENS, TOKEN = matrix("E", WIDTH, QUERIES), vector("e", WIDTH, "j")
TAKE_X, TAKE_Y = matrix("I_x", IN, WIDTH), matrix("I_y", OUT, WIDTH)
INPUT, TARGET, MOVED = vector("x", IN, "j"), vector("y", OUT, "j"), vector("y", OUT, "j", "+")
START, AFTER, U = matrix("W_0"), matrix("W_1"), matrix("U")
RATE, COUNT = sp.Symbol(r"\eta", positive=True), sp.Symbol("N", positive=True)
LOSS = number("L(U)")
KEY, QUERY, VALUE = matrix("W_K", IN, WIDTH), matrix("W_Q", IN, WIDTH), matrix("W_V", OUT, WIDTH)


@cache
def gradient_descent_attention() -> Derivation:
    r"""Derive what a step of gradient descent does to a token, and that linear attention does the same.

    $$y_j^+ = y_j + \frac{\eta}{N} (W_0 X - Y) X^\top x_j$$

    The columns of $X$ and $Y$ are the $N$ examples of the context. After a step from $W_0$ to $W_1$ the residual of
    token $j$ is $W_1 x_j - y_j$. The target $y_j^+$ gives the same residual with the weights $W_0$, so a second layer
    with the same weights makes the second step.

    Source: von Oswald et al. (arXiv 2212.07677), version 2, Proposition 1.

    Shapes: the result, $y_j^+$ ``[out]``, is a function of ``W_0`` ``[out, in]``, ``X`` ``[in, examples]``, ``Y``
    ``[out, examples]``, ``x`` ``[in]``, ``y`` ``[out]``, ``eta`` ``[]`` and ``N`` ``[]``, the number of examples.

    >>> import numpy as np
    >>> derivation = gradient_descent_attention()
    >>> derivation.check()
    True
    >>> f, one = derivation.lambdify(), np.ones((1, 1))
    >>> f(0 * one, one, 3 * one, np.array([2.0]), np.array([0.0]), np.array(0.5), np.array(1.0))
    array([-3.])
    """
    loss = squared_norm(U * X - Y) / (2 * COUNT)
    slope = rewritten(gradient(loss, U), 1 / COUNT * (U * X - Y) * X.T)
    after = START - RATE * slope.xreplace({U: START})
    # The residual with W_0 and the new target is to be that of W_1 with the old one.
    target = rewritten(solved(expanded(START * INPUT - MOVED - (AFTER * INPUT - TARGET)), MOVED), _moved_by(AFTER))
    result = rewritten(expanded(target.xreplace({AFTER: after})), TARGET + RATE / COUNT * (START * X - Y) * X.T * INPUT)
    read = RATE / COUNT * (VALUE * TOKENS) * (KEY * TOKENS).T * (QUERY * TOKEN)

    return Derivation(
        name="gradient_descent_attention",
        source="von Oswald et al. 2023 (arXiv 2212.07677), version 2, Proposition 1",
        assumptions=dict(
            tokens=Step(
                f"**Tokens.** Each token has an input and a target; ${latex(TAKE_X)}$ and ${latex(TAKE_Y)}$ take them "
                f"out. The columns of ${latex(TOKENS)}$ are the tokens of the context.",
                Identity(X, TAKE_X * TOKENS),
                Identity(Y, TAKE_Y * TOKENS),
                Identity(INPUT, TAKE_X * TOKEN),
                Identity(TARGET, TAKE_Y * TOKEN),
            ),
            loss=Step("**Loss.** The mean squared error of the regression in the context.", Identity(LOSS, loss)),
            descent=Step(
                f"**Step.** Gradient descent goes from ${latex(START)}$ to ${latex(AFTER)}$.",
                Identity(AFTER, after),
            ),
            nonzero=Step("**Something to learn from.** There is at least one example.", Nonzero(COUNT)),
            residual=Step(
                f"**Same residual.** The new target is to leave with ${latex(START)}$ the residual that the old one "
                f"leaves with ${latex(AFTER)}$.",
                Asked(START * INPUT - MOVED, AFTER * INPUT - TARGET),
            ),
        ),
        steps=dict(
            solve=Step("**Solve for the target.** It moves against the step of the prediction.", Asked(MOVED, target)),
            put_in=Step("**Put in the step.** The gradient is a sum over the examples.", Asked(MOVED, result)),
            weights=Step(
                "**Weights.** Keys and queries take out the input, and the value of a token is its residual at the "
                "start.",
                Identity(KEY, TAKE_X),
                Identity(QUERY, TAKE_X),
                Identity(VALUE, START * TAKE_X - TAKE_Y),
            ),
            attention=Step(
                "**Attention.** With these weights, linear attention adds to the target what the step does.",
                Asked(MOVED - TARGET, read),
            ),
        ),
        unknown=MOVED,
        result=result,
        arguments={"W_0": START, "X": X, "Y": Y, "x": INPUT, "y": TARGET, "eta": RATE, "N": COUNT},
        shapes={
            "W_0": "out in",
            "X": "in examples",
            "Y": "out examples",
            "x": "in",
            "y": "out",
            "eta": "",
            "N": "",
            "return": "out",
        },
        names={
            LOSS: loss,
            AFTER: after,
            X: TAKE_X * TOKENS,
            Y: TAKE_Y * TOKENS,
            INPUT: TAKE_X * TOKEN,
            TARGET: TAKE_Y * TOKEN,
            KEY: TAKE_X,
            QUERY: TAKE_X,
            VALUE: START * TAKE_X - TAKE_Y,
        },
    )


def _moved_by(after: sp.MatrixExpr) -> sp.MatrixExpr:
    """Return the target, less the change of the prediction that a step makes."""
    return TARGET - (after - START) * INPUT
