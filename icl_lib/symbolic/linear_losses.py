r"""The step that each token makes, and the linear loss of which it is a gradient step."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import sympy as sp

from icl_lib.symbolic.algebra import gradient, solved
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten, total
from icl_lib.symbolic.notation import dot, latex, matrix, number, rank_one, squared_norm, vector
from icl_lib.symbolic.weight_update import weight_update

G, U, DELTA, RATE = matrix("G"), matrix("U"), matrix(r"\Delta_i"), sp.Symbol(r"\eta", positive=True)
TOKENS = 3
"""The sum of the steps is proved for three tokens; the induction step covers any number."""


class Tokens:
    """What is read, and the weights, before and after token i."""

    def __init__(self) -> None:
        self.W, self.a_0, _ = weight_update().arguments.values()
        self.before, self.now = vector("a", index="i-1"), vector("a", index="i")
        self.W_before, self.W_now = matrix("W_{i-1}"), matrix("W_i")
        self.symbols = self.W, self.a_0, self.before, self.now, self.W_before, self.W_now
        self.weights = {self.W_before: self.weights_for(self.before), self.W_now: self.weights_for(self.now)}

    def update_for(self, read: sp.MatrixExpr) -> sp.MatrixExpr:
        """Return the weight update that belongs to what is read."""
        least = weight_update()
        return least.result.xreplace({least.arguments["a_with"]: read})

    def weights_for(self, read: sp.MatrixExpr) -> sp.MatrixExpr:
        """Return the edited weights that belong to what is read."""
        return self.W + self.update_for(read)

    def assumptions(self) -> dict[str, Step]:
        """Return what the weights are, and what is not zero."""
        return dict(
            weights=Step(
                "**Weights after some tokens.** With the first $i$ tokens as the context the layer reads "
                f"${latex(self.now)}$. The edited weights $W_i$ have the update that belongs to it (`weight_update`).",
                Identity(self.W_now, self.W + rank_one(self.W * (self.now - self.a_0), self.a_0)),
            ),
            nonzero=weight_update().step("nonzero"),
        )

    def before_the_step(self) -> Step:
        """Return what the weights before the step return."""
        return Step(
            f"**Before the step.** The weights $W_{{i-1}}$ map ${latex(self.a_0)}$ to what $W$ computes from "
            f"${latex(self.before)}$.",
            Identity(self.W_before * self.a_0, self.W * self.before),
        )


@cache
def linear_losses() -> Derivation:
    r"""Derive the step of token $i$, and a loss that makes it a step of gradient descent.

    $$W_i - W_{i-1} = \frac{W (a_i - a_{i-1})\, a_0^\top}{\|a_0\|^2} = -\eta\, \nabla L_i(W_{i-1}), \qquad
    L_i(U) = \operatorname{tr}(\Delta_i^\top U), \quad \eta = \frac{1}{\|a_0\|^2}, \quad
    \Delta_i = W (a_{i-1} - a_i)\, a_0^\top$$

    $a_i = A(c_1 \dots c_i, x)$ is read after $i$ tokens, and $W_i = W + \Delta W(c_1 \dots c_i)$. The loss is not
    guessed: a linear loss with unknown coefficients is asked for, and SymPy solves for them. The last steps say what
    that is worth: the same question has an answer for any two matrices, and a linear loss has no minimum.

    Source: Dherin et al. (arXiv 2507.16003), version 1, Proposition 3.1 ($h$ for $\eta$); that any sequence of matrices
    has such losses: this book.

    Shapes: the result, the step $W_i - W_{i-1}$, is a function of ``W`` ``[out, in]``, ``a_without`` ``[in]``,
    ``a_before`` ``[in]``, which is $a_{i-1}$, and ``a_now`` ``[in]``, which is $a_i$.

    >>> import numpy as np
    >>> derivation = linear_losses()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(2), np.array([1.0, 1.0]), np.array([3.0, 1.0]), np.array([5.0, 0.0]))
    array([[ 1. ,  1. ],
           [-0.5, -0.5]])
    """
    tokens = Tokens()
    W, a_0, before, now, W_before, W_now = tokens.symbols
    step = rewritten(tokens.weights[W_now] - tokens.weights[W_before], rank_one(W * (now - before), a_0))
    losses, of_losses, solution = _losses(tokens, step)
    sums, of_sums = _all_tokens(tokens)

    return Derivation(
        name="linear_losses",
        source="Dherin et al. 2025 (arXiv 2507.16003), version 1, Proposition 3.1",
        assumptions=tokens.assumptions(),
        steps=dict(
            step=Step(
                f"**The step of token $i$.** We subtract. The right factor is ${latex(a_0)}$ for every token.",
                Identity(W_now - W_before, step),
            ),
            **losses,
            **sums,
        ),
        unknown=matrix("W_i - W_{i-1}"),
        result=step,
        statement=Asked(matrix("W_i - W_{i-1}"), -DELTA / squared_norm(a_0), step),
        arguments={"W": W, "a_without": a_0, "a_before": before, "a_now": now},
        names={**tokens.weights, **of_losses, **of_sums},
        solution=solution,
        beyond=lambda candidate: (Identity(W_before + candidate, W_now),),
    )


def _coefficients(step: Any) -> Any:
    """Return the coefficients of the linear loss of which a step is a gradient step."""
    return rewritten(solved(step + RATE * gradient(dot(G, U), U), G), -step / RATE)


def _losses(tokens: Tokens, step: Any) -> tuple[dict[str, Step], dict[Any, Any], dict[Any, Any]]:
    """Return the steps that find the loss and say what it is worth, the names in them, and what is solved for."""
    W, a_0, before, now, W_before, W_now = tokens.symbols
    any_loss, loss, slope = number("L(U)"), number("L_i(U)"), matrix(r"\nabla L")
    t, lower = number("t"), number(r"L_i(U - t \Delta_i)")
    solution = {G: _coefficients(step), RATE: 1 / squared_norm(a_0)}
    found = rewritten(solution[G].xreplace({RATE: solution[RATE]}), W * (before - now) * a_0.T)
    M_before, M_now, any_slope = matrix("M_{i-1}"), matrix("M_i"), matrix("G'")
    of_any = rewritten(_coefficients(M_now - M_before), (M_before - M_now) / RATE)

    steps = dict(
        unknown_loss=Step(
            "**A linear loss with unknown coefficients.** Its gradient is the matrix of its coefficients, wherever "
            "it is taken.",
            Identity(any_loss, dot(G, U)),
            Identity(slope, G),
        ),
        coefficients=Step(
            "**Its coefficients.** We ask that the step be a gradient step at some rate $\\eta$, and solve for the "
            "coefficients. Every rate has its loss.",
            Asked(W_now, W_before - RATE * G),
            Asked(G, solution[G]),
        ),
        rate=Step(
            "**A rate.** With this rate the denominator cancels. This is the loss of the proposition, and "
            "$\\Delta_i$ is its gradient.",
            Asked(RATE, solution[RATE]),
            Asked(G, DELTA),
            Identity(DELTA, found),
        ),
        descent=Step(
            "**Gradient descent.** So every token makes a step of gradient descent on a loss of its own.",
            Identity(W_now, W_before - DELTA / squared_norm(a_0)),
            Identity(loss, dot(DELTA, U)),
        ),
        any_two_matrices=Step(
            "**Any two matrices.** The loss was read off the step. The same equation can be solved for any two "
            "matrices, so any sequence of matrices is gradient descent on such losses.",
            Identity(M_now, M_before - RATE * any_slope),
            Identity(any_slope, of_any),
        ),
        no_minimum=Step(
            "**No minimum.** Unless its gradient is zero, the loss falls without bound along the negative "
            "gradient, as any linear function does.",
            Identity(lower, loss - t * squared_norm(DELTA)),
        ),
    )
    names = {any_loss: dot(G, U), slope: gradient(dot(G, U), U), any_slope: of_any, DELTA: found}
    return steps, {**names, loss: dot(found, U), lower: dot(found, U - t * found)}, solution


def _all_tokens(tokens: Tokens) -> tuple[dict[str, Step], dict[Any, Any]]:
    """Return the steps that add up the steps of all tokens, and the names in them."""
    W, a_0, before, now, W_before, W_now = tokens.symbols
    reads = (a_0, *(vector("a", index=str(k)) for k in range(1, TOKENS + 1)))
    weights = pairwise(tokens.weights_for(read) for read in reads)
    instances = tuple({W_before: old, W_now: new} for old, new in weights)
    added, meaning = total(r"\sum_{i=1}^{n}", W_now - W_before, instances)
    last, difference = vector("a", index="n"), matrix("(W_i - W_{i-1})")
    updates = {
        matrix(rf"\Delta W({of})"): tokens.update_for(read)
        for of, read in ((r"\varnothing", a_0), (r"c_1 \dots c_{i-1}", before), (r"c_1 \dots c_i", now))
    }
    of_none, of_before, of_now = updates
    steps = dict(
        induction=Step(
            "**One token more.** Without tokens the update is zero. The update of the first $i$ tokens is that of "
            "the first $i - 1$ plus the step of token $i$.",
            Identity(of_none, sp.ZeroMatrix(*W.shape)),
            Identity(of_now, of_before + difference),
        ),
        sum=Step(
            "**All tokens.** By induction, the steps of all tokens add up to the update of the whole context.",
            Identity(added, rank_one(W * (last - a_0), a_0)),
        ),
    )
    return steps, {added: meaning, last: reads[-1], difference: W_now - W_before, **updates}
