r"""Two softmax heads of opposite signs predict, to first order, as a step of debiased gradient descent."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import sympy as sp

from icl_lib.symbolic.algebra import expanded, gradient
from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Step, rewritten, total
from icl_lib.symbolic.notation import IN, checked_sizes, dot, latex, matrix, number, vector

SCALE, VALUE, COUNT = number(r"\omega"), number(r"\mu"), sp.Symbol("L", positive=True)
INPUT, TARGET, SCORE, ASKED = vector("x", IN, "l"), number("y_l"), number("s_l"), vector("x", IN, "q")
MEAN, MEAN_TARGET = matrix(r"\bar{\boldsymbol{x}}", IN, 1), number(r"\bar y")
CENTRED, CENTRED_TARGET = matrix(r"\tilde{\boldsymbol{x}}_{l}", IN, 1), number(r"\tilde y_l")
HEAD, OPPOSED, PAIR = number(r"\hat y_{+}"), number(r"\hat y_{-}"), number(r"\hat y(\omega)")
FIRST_ORDER = number(r"\hat y_1")


class Examples:
    """One example l, which stands for all, and the examples that are added up."""

    def __init__(self, count: int) -> None:
        numbers = range(1, count + 1)
        self.inputs = tuple(vector("x", IN, str(k)) for k in numbers)
        self.targets = tuple(number(f"y_{k}") for k in numbers)
        self.scores = tuple(number(f"s_{k}") for k in numbers)
        self.mean, self.mean_target = sp.MatAdd(*self.inputs) / count, sp.Add(*self.targets) / count
        centre = {CENTRED: INPUT - MEAN, CENTRED_TARGET: TARGET - MEAN_TARGET}
        self.instances = []
        for x, y, s in zip(self.inputs, self.targets, self.scores, strict=True):
            own = {INPUT: x, TARGET: y, SCORE: s}
            self.instances.append(own | {name: meaning.xreplace(own) for name, meaning in centre.items()})
        self.names: dict[Any, Any] = {
            COUNT: sp.Integer(count),
            MEAN: self.mean,
            MEAN_TARGET: self.mean_target,
            SCORE: dot(INPUT, ASKED),
            **{s: dot(x, ASKED) for s, x in zip(self.scores, self.inputs, strict=True)},
            **centre,
        }

    def sum(self, term: Any) -> Any:
        """Return the symbol of a sum over the examples, whose terms are added to the names."""
        symbol, self.names[symbol] = total(r"\sum_l", term, tuple(self.instances))
        return symbol

    def head(self) -> Any:
        r"""Return the output of a head in terms of its scores, $\sum_l y_l e^{\omega s_l} / \sum_l e^{\omega s_l}$."""
        weights = [sp.exp(SCALE * s) for s in self.scores]
        return sp.Add(*(y * w for y, w in zip(self.targets, weights, strict=True))) / sp.Add(*weights)


@lru_cache(maxsize=None, typed=True)
def debiased_descent(examples: int = 3) -> Derivation:
    r"""Derive what two heads with the scales $\pm\omega$ and the values $\pm\mu$ predict, to first order in $\omega$.

    $$\hat y \approx \frac{2 \omega \mu}{L} \sum_{l=1}^{L} y_l\, (x_l - \bar x)^\top x_q$$

    A head outputs the mean of the targets $y_l$ with the softmax of $\omega\, x_l^\top x_q$ as weights. SymPy
    differentiates it. The difference of the two heads is odd in $\omega$, so the first term that is left out has the
    power $\omega^3$. What remains is a step of gradient descent from zero on the centred examples.

    Source: He et al. 2025 (arXiv 2503.12734), the debiased gradient descent predictor; that the error is of third
    order: this book.

    Args:
        examples: how many examples the proof adds up; the size of the inputs is a symbol.

    Shapes: the result, the first-order term, is a function of ``x`` ``[examples, in]``, ``y`` ``[examples]``, ``x_q``
    ``[in]``, ``omega`` ``[]`` and ``mu`` ``[]``.

    Raises `ValueError` if the number of examples is not a whole number of at least 1.

    >>> import numpy as np
    >>> derivation = debiased_descent(2)
    >>> derivation.check()
    True
    >>> x, y, x_q = np.array([[1.0, 0.0], [3.0, 0.0]]), np.array([1.0, 2.0]), np.array([1.0, 5.0])
    >>> float(derivation.lambdify()(x, y, x_q, np.array(0.5), np.array(2.0)))
    1.0
    """
    checked_sizes(examples=examples)
    of = Examples(examples)
    head = of.head()
    pair = VALUE * (head - head.subs(SCALE, -SCALE))
    towards = of.sum(TARGET * dot(CENTRED, ASKED))
    start, slope, curvature = number(r"\hat y_{+}(0)"), number(r"\hat y_{+}'(0)"), number(r"\hat y''(0)")
    mirrored = number(r"\hat y(-\omega)")
    steps, of_descent = _descent(of)
    names = {
        **of_descent,
        HEAD: head,
        OPPOSED: head.subs(SCALE, -SCALE),
        PAIR: pair,
        start: head.subs(SCALE, 0),
        slope: head.diff(SCALE).subs(SCALE, 0),
        mirrored: pair.subs(SCALE, -SCALE),
        curvature: pair.diff(SCALE, 2).subs(SCALE, 0),
    }
    centred = [y * dot(x - of.mean, ASKED) for x, y in zip(of.inputs, of.targets, strict=True)]
    found = (SCALE * pair.diff(SCALE).subs(SCALE, 0)).xreplace(of.names)
    weights = of.sum(TARGET * sp.exp(SCALE * SCORE)), of.sum(sp.exp(SCALE * SCORE))

    return Derivation(
        name="debiased_descent",
        source="He et al. 2025 (arXiv 2503.12734)",
        assumptions=dict(
            head=Step(
                "**One head.** It outputs the mean of the targets, with the softmax of the scores as weights.",
                Identity(SCORE, dot(INPUT, ASKED)),
                Identity(HEAD, weights[0] / weights[1]),
            ),
            pair=Step(
                f"**Two heads of opposite signs.** ${latex(OPPOSED)}$ is the same head with $-\\omega$ for $\\omega$.",
                Identity(PAIR, VALUE * (HEAD - OPPOSED)),
            ),
            means=Step(
                "**Means.** A bar is a mean over the $L$ examples, and a tilde says that it is subtracted.",
                Identity(MEAN, of.sum(INPUT) / COUNT),
                Identity(CENTRED, INPUT - MEAN),
                Identity(CENTRED_TARGET, TARGET - MEAN_TARGET),
            ),
        ),
        steps=dict(
            start=Step(
                "**Equal weights.** For $\\omega = 0$ a head outputs the mean of the targets. In the pair it cancels.",
                Identity(start, MEAN_TARGET),
            ),
            slope=Step("**The slope of a head.** SymPy differentiates the head.", Identity(slope, towards / COUNT)),
            odd=Step(
                "**Odd.** The pair changes its sign with $\\omega$. So it has no terms of even power, and what is left "
                "out below is of the order $\\omega^3$.",
                Identity(mirrored, -PAIR),
                Identity(curvature, sp.S.Zero),
            ),
            first_order=Step(
                "**First order.** The slopes of the two heads add up.",
                Asked(FIRST_ORDER, 2 * SCALE * VALUE * slope),
                Asked(FIRST_ORDER, 2 * SCALE * VALUE / COUNT * towards),
            ),
            **steps,
        ),
        unknown=FIRST_ORDER,
        result=rewritten(found, 2 * SCALE * VALUE / examples * sp.Add(*centred)),
        statement=Asked(FIRST_ORDER, 2 * SCALE * VALUE / COUNT * towards),
        arguments={"x": of.inputs, "y": of.targets, "x_q": ASKED, "omega": SCALE, "mu": VALUE},
        names={**of.names, **names},
    )


def _descent(of: Examples) -> tuple[dict[str, Step], dict[Any, Any]]:
    """Return the step that says of which regression this is a gradient step, and the names in it."""
    weights, loss, steepest = (
        vector("w"),
        number(r"\ell(\boldsymbol{w})"),
        matrix(r"\nabla \ell(\boldsymbol{0})", IN, 1),
    )
    squares, pulled = of.sum((dot(CENTRED, weights) - CENTRED_TARGET) ** 2), of.sum(TARGET * CENTRED)
    meaning = of.names[squares] / (2 * COUNT)
    step = Step(
        "**Gradient descent.** Take the means out of the inputs and of the targets. A step from zero on the regression "
        "that is left, at the rate $2 \\omega \\mu$, makes this prediction.",
        Identity(loss, squares / (2 * COUNT)),
        Identity(steepest, -pulled / COUNT),
        Asked(FIRST_ORDER, -2 * SCALE * VALUE * dot(steepest, ASKED)),
    )
    names = {loss: meaning, steepest: expanded(gradient(meaning, weights).xreplace({weights: sp.ZeroMatrix(IN, 1)}))}
    return dict(descent=step), names
