r"""The best layer of linear attention for regression prompts with Gaussian inputs."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.algebra import gradient
from icl_lib.symbolic.derivation import Asked, Derivation, Given, Identity, Nonzero, Step, rewritten
from icl_lib.symbolic.notation import WIDTH, latex, matrix, number, vector

SIGMA, U, A, H = (matrix(name, WIDTH, WIDTH) for name in (r"\Sigma", "U", "A", "H"))
SAMPLE, FOURTH, SECOND = (matrix(name, WIDTH, WIDTH) for name in (r"\hat{\Sigma}", "F", "S"))
TURNED, BY_EIGENVECTORS = matrix(r"\Sigma'", WIDTH, WIDTH), matrix("B", WIDTH, WIDTH)
COUNT = sp.Symbol("N", positive=True)
ONE, SPECTRUM = sp.Identity(WIDTH), sp.DiagMatrix(vector(r"\lambda", WIDTH))


@cache
def one_layer_optimum() -> Derivation:
    r"""Derive the matrix with which one layer of linear attention has the least expected squared error.

    $$A = \Bigl(\tfrac{N+1}{N}\, \Sigma + \tfrac{\operatorname{tr} \Sigma}{N}\, I\Bigr)^{-1}$$

    The layer predicts $w^\top \hat\Sigma A\, x$ for the target $w^\top x$. The inputs are $N(0, \Sigma)$ and the tasks
    $N(0, I)$, so the loss is quadratic in $A$, with moments of the inputs in it. Two forms come out as equal: this one,
    of Zhang et al., and the one with the eigenvectors of $\Sigma$, of Ahn et al.

    Source: Ahn et al. (arXiv 2306.00297), Theorem 1; Zhang et al. (arXiv 2501.16265), version 2.

    Shapes: the result, $A$ ``[d, d]``, is a function of ``covariance`` ``[d, d]`` and ``N`` ``[]``, the number of
    examples.

    >>> import numpy as np
    >>> derivation = one_layer_optimum()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.eye(3), np.array(4.0))[0]  # N / (N + d + 1)
    array([0.5, 0. , 0. ])
    """
    total = sp.Trace(SIGMA)
    fourth = 2 * SIGMA * SIGMA + total * SIGMA
    second = (COUNT + 1) / COUNT * SIGMA * SIGMA + total / COUNT * SIGMA
    names = {SIGMA: SPECTRUM, FOURTH: fourth, SECOND: second, TURNED: U * SIGMA * U.T}

    def inverted(covariance: sp.MatrixExpr) -> sp.MatrixExpr:
        return (COUNT + 1) / COUNT * covariance + sp.Trace(covariance) / COUNT * ONE

    def loss(at: sp.MatrixExpr) -> sp.Expr:
        return total - 2 * sp.Trace(SIGMA * at * SIGMA) + sp.Trace(at * SIGMA * at.T * SECOND)

    values = {at: number(rf"L({latex(at)})") for at in (A, A + H)}
    of_one = sp.Trace((ONE - SAMPLE * A) * SIGMA * (ONE - A.T * SAMPLE))
    slope = matrix(r"\nabla L(A)", WIDTH, WIDTH)
    in_eigenvalues = {SECOND: second.xreplace({SIGMA: SPECTRUM}), SIGMA: SPECTRUM}
    found = rewritten(
        gradient(loss(A).xreplace(in_eigenvalues), A),
        (2 * SECOND * A * SIGMA - 2 * SIGMA * SIGMA).xreplace(in_eigenvalues),
    )
    result = sp.Inverse(inverted(SIGMA))
    with_vectors = U * result * U.T

    return Derivation(
        name="one_layer_optimum",
        source="Ahn et al. 2023 (arXiv 2306.00297), Theorem 1; Zhang et al. 2025 (arXiv 2501.16265), version 2",
        assumptions=dict(
            covariance=Step(
                "**Inputs.** They are Gaussian with mean zero. In the coordinates of its eigenvectors, their "
                "covariance is diagonal.",
                Identity(SIGMA, SPECTRUM),
            ),
            error=Step(
                "**Error.** The prediction is $\\boldsymbol{w}^\\top \\hat{\\Sigma} A\\, \\boldsymbol{x}$, with the "
                f"sample covariance ${latex(SAMPLE)}$ of the context. The target is "
                "$\\boldsymbol{w}^\\top \\boldsymbol{x}$. Averaged over queries, and over tasks with covariance $I$, "
                "the squared error for one context is this.",
                Identity(
                    of_one,
                    total
                    - sp.Trace(SAMPLE * A * SIGMA)
                    - sp.Trace(SIGMA * A.T * SAMPLE)
                    + sp.Trace(SAMPLE * A * SIGMA * A.T * SAMPLE),
                ),
            ),
            fourth=Step(
                f"**Fourth moments.** The theorem of Isserlis gives the mean ${latex(FOURTH)}$ of "
                "$\\boldsymbol{x}\\boldsymbol{x}^\\top \\boldsymbol{x}\\boldsymbol{x}^\\top$.",
                Identity(FOURTH, fourth),
            ),
            orthogonal=Step(
                f"**Orthogonal eigenvectors.** A symmetric matrix has orthonormal eigenvectors, in ${latex(U)}$.",
                Given(U.T * U, ONE),
                Given(U * U.T, ONE),
            ),
            invertible=Step(
                "**Something to learn from.** There is at least one example, and no direction is without variance.",
                Nonzero(COUNT),
                Nonzero(number(rf"\det({latex(SIGMA)})")),
            ),
        ),
        steps=dict(
            second=Step(
                f"**Average over the contexts.** The mean of ${latex(SAMPLE)}$ is ${latex(SIGMA)}$. Of the pairs of "
                f"examples in ${latex(SAMPLE * SAMPLE)}$, $N$ are an example with itself, and the others are "
                f"independent. So its mean ${latex(SECOND)}$ is this.",
                Identity(SECOND, FOURTH / COUNT + (COUNT - 1) / COUNT * SIGMA * SIGMA),
                Identity(SECOND, second),
            ),
            loss=Step("**Loss.** The expected squared error is quadratic.", Identity(values[A], loss(A))),
            stationarity=Step(
                "**Stationarity.** At a minimum the gradient is zero.",
                Identity(slope, 2 * SECOND * A * SIGMA - 2 * SIGMA * SIGMA),
                Asked(SECOND * A * SIGMA, SIGMA * SIGMA),
            ),
            solve=Step(
                f"**Solve.** A factor ${latex(SIGMA)}$ of ${latex(SECOND)}$ and the ${latex(SIGMA)}$ on the right "
                "cancel.",
                Identity(SECOND, SIGMA * inverted(SIGMA)),
                Asked(inverted(SIGMA) * A, ONE),
                Asked(A, result),
            ),
            minimum=Step(
                "**Minimum.** Any other matrix has a larger loss: the difference is the mean of a square.",
                Asked(values[A + H] - values[A], sp.Trace(H * SIGMA * H.T * SECOND)),
            ),
            eigenvectors=Step(
                f"**Other coordinates.** They have eigenvectors in an orthogonal ${latex(U)}$, and the covariance "
                f"${latex(TURNED)}$. Ahn et al. turn the diagonal solution, and get ${latex(BY_EIGENVECTORS)}$. Zhang "
                "et al. put the new covariance into the formula. It is the same matrix, because the product with what "
                "they invert is the identity.",
                Identity(TURNED, U * SIGMA * U.T),
                Identity(BY_EIGENVECTORS, with_vectors),
                Identity(inverted(TURNED) * BY_EIGENVECTORS, ONE),
            ),
            white=Step(
                f"**White inputs.** For ${latex(SIGMA)} = I$ the trace is the number of features.",
                Identity(sp.Inverse(inverted(ONE)), COUNT / (COUNT + WIDTH + 1) * ONE),
            ),
        ),
        unknown=A,
        result=result,
        arguments={"covariance": SIGMA, "N": COUNT},
        shapes={"covariance": "d d", "N": "", "return": "d d"},
        names={**names, values[A]: loss(A), values[A + H]: loss(A + H), slope: found, BY_EIGENVECTORS: with_vectors},
    )
