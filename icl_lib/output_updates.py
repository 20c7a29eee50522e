r"""Edits that add the difference of the residual stream, $\Delta h$, at the end of a block without an output bias.

The last matrix of the MLP can add it (:func:`output_update`). If a norm follows the MLP, its scale can
(:func:`scale_update`), or matrix and scale together (:func:`turning_update`).

Source: Goldwaser, Munn, Gonzalvo, Dherin, *Equivalence of Context and Parameter Updates in Modern Transformer Blocks*
(arXiv 2511.17864, ICML 2026). :func:`turning_update` is this library's own: it does not divide by the
normalised activation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.low_rank import LowRank
from icl_lib.theorem import NoSingleEditError, directions, require_representable
from icl_lib.validation import (
    require_broadcastable,
    require_finite,
    require_float,
    require_nowhere,
    require_same_kind,
)

NEWTON_STEPS = 100
"""The number of Newton steps after which :func:`turning_update` reports that no shared scale exists."""


def output_update(change: Float[Tensor, "*#batch out"], hidden: Float[Tensor, "*#batch in_"]) -> LowRank:
    r"""The smallest edit of the MLP's last matrix that adds a given change to its output.

    $$\Delta W_\text{down} = \frac{\Delta h\, y^\top}{\lVert y \rVert^2}, \qquad
      (W_\text{down} + \Delta W_\text{down})\, y = W_\text{down}\, y + \Delta h .$$

    It replaces the bias update $\Delta b' = \Delta h$ if the MLP has no bias. Source: Goldwaser et al. (arXiv
    2511.17864).

    Shapes: ``change`` $\Delta h$ is ``[*batch, out]``; ``hidden`` $y$, the input of the matrix, is ``[*batch, in]``.
    Leading dimensions broadcast. Raises `ValueError` for a zero, NaN or infinite $y$, as
    :func:`icl_lib.theorem.weight_update` does.

    >>> output_update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])).dense()
    tensor([[0.0000, 0.5000],
            [0.0000, 1.0000]])
    """
    _require_finite_vectors(change=change, hidden=hidden)
    require_same_kind("change", change, hidden=hidden)
    require_broadcastable(change=change.shape[:-1], hidden=hidden.shape[:-1])
    require_nowhere(
        "hidden",
        (hidden == 0).all(-1),
        "is zero: no edit of a matrix changes its output for a zero input. Let the bias take the change "
        "(outer='bias').",
    )
    scale, length, unit = directions(hidden)
    left = change / scale / length
    require_representable(left, "Δh/‖y‖", "y")
    return LowRank(left.unsqueeze(-1), unit.unsqueeze(-1))


def _require_finite_vectors(dims: int = 1, layout: str = "[*batch, width]", **vectors: Tensor) -> None:
    for name, given in vectors.items():
        require_float(name, given, dims, layout)
        require_finite(name, given, "look for overflow or NaN weights before it.")


def scale_update(
    change: Float[Tensor, "*batch dim"], normed: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    r"""The edit of a norm's scale that adds a given change to the norm's output.

    $$\Delta \gamma = \Delta h \oslash \bar o, \qquad
      (\gamma + \Delta \gamma) \odot \bar o = \gamma \odot \bar o + \Delta h .$$

    For blocks with a norm between the MLP and the residual stream. Source: Goldwaser et al. (arXiv 2511.17864), for
    Gemma.

    Shapes: ``change`` $\Delta h$ and ``normed`` $\bar o$, the normalised activation before it is scaled, are
    ``[*batch, dim]``. Raises `ValueError` if some $\bar o_j$ is zero and the change there is not, and for NaN and
    infinity.

    >>> scale_update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0]))
    tensor([ 0.5000, -3.0000])
    """
    _require_finite_vectors(change=change, normed=normed)
    require_same_kind("change", change, normed=normed)
    require_nowhere(
        "normed",
        (normed == 0) & (change != 0),
        "is zero: this feature of the norm's output is zero for every scale, so no scale can add the change to it. "
        "Let the last matrix and the scale take the change together (outer='down').",
    )
    scale = torch.where(change == 0, change, change / normed)
    require_representable(scale, "Δh/ō", "ō")
    return scale


def turning_update(
    wanted: Float[Tensor, "m dim"],
    read: Float[Tensor, "m dim"],
    normed: Float[Tensor, "m dim"],
    scale: Tensor,
    shared: bool = False,
) -> tuple[Float[Tensor, "m dim"], Float[Tensor, "*m dim"]]:
    r"""Change the input of a norm, and its scale, so that its output is a given vector.

    The norm outputs $\gamma \odot \bar o$ with $\bar o = o/\rho$, where $\rho > 0$ depends on $\lVert o \rVert$
    alone (RMSNorm, with or without an epsilon). So $\lVert \bar o \rVert$ is fixed by $\lVert o \rVert$. To output
    $t$, the input is turned, that is, replaced by a vector of the same length, and the scale is multiplied by a
    stretch factor $\kappa$:

    $$\kappa = \frac{\lVert t \oslash \gamma \rVert}{\lVert \bar o \rVert}, \qquad \gamma' = \kappa \gamma, \qquad
      o' = \rho\, (t \oslash \gamma') .$$

    Then $\lVert o' \rVert = \lVert o \rVert$, so the norm divides by the same $\rho$ and outputs
    $\gamma' \odot o'/\rho = t$. No entry of $\bar o$ is divided by; the entries of $\gamma$ are.

    With ``shared``, one scale serves all $m$ vectors: the $\gamma'$ nearest to $\gamma$ (in relative entropy of
    $1/\gamma'^2$) with $\lVert t_k \oslash \gamma' \rVert = \lVert \bar o_k \rVert$ for every $k$.

    Shapes: ``wanted`` $t$, ``read`` $o$ and ``normed`` $\bar o$ are ``[m, dim]``; ``scale`` $\gamma$, the factor of
    $\bar o$, is ``[dim]``. Returns $o' - o$ and $\gamma'$, which is ``[m, dim]``, or ``[dim]`` if it is shared. Raises
    `ValueError` if an entry of the scale is zero, if $t$ or $o$ is zero, and if no shared scale is found.

    >>> t, o, scale = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.ones(2)
    >>> change, stretched = turning_update(t, o, o / o.square().mean().sqrt(), scale)
    >>> turned = o + change
    >>> torch.allclose(stretched * turned / turned.square().mean().sqrt(), t)
    True
    """
    _require_finite_vectors(2, "[m, dim]", wanted=wanted, read=read, normed=normed)
    require_float("scale", scale, 1, "[dim]")
    for name, zero in (("scale", scale == 0), ("wanted", (wanted == 0).all(-1)), ("read", (read == 0).all(-1))):
        require_nowhere(
            name, zero, "is zero: turning divides by it. Let the scale alone take the change (outer='scale')."
        )
    length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    if shared:
        new = _shared_scale(wanted, length, scale)
    else:
        new = scale * (torch.linalg.vector_norm(wanted / scale, dim=-1, keepdim=True) / length)
    divisor = torch.linalg.vector_norm(read, dim=-1, keepdim=True) / length
    return divisor * (wanted / new) - read, new


def _shared_scale(wanted: Tensor, length: Tensor, scale: Tensor) -> Tensor:
    r"""Newton's method on the dual: $1/\gamma'^2 = \exp(A^\top \lambda)/\gamma^2$, one multiplier for each vector."""
    shares = (wanted / scale / length).double().square()  # the share of each feature in the length of each vector
    shares, start = shares * (1 / shares.sum(-1).mean()), 1 / shares.sum(-1).mean()
    dual = torch.zeros(len(shares), dtype=torch.float64, device=shares.device)
    for _ in range(NEWTON_STEPS):
        weights = torch.exp(dual @ shares)
        missing = 1 - shares @ weights
        if bool(missing.abs().max() < 1e-14):  # where the iteration stops; nothing is divided by it
            break
        step = torch.linalg.lstsq((shares * weights) @ shares.mT, missing).solution
        # Full steps once they are small; before that no exponent may grow by more than one.
        dual = dual + step / max(1.0, float((step @ shares).abs().max()))
    # The bound is loose because the norms that need a shared scale compute in float32.
    if not bool(missing.abs().max() < 1e-9):
        raise NoSingleEditError(
            f"no scale of the norm was found that serves all {len(shares)} vectors at once: give each position its own "
            "edits, or use a shorter query."
        )
    return scale * (1 / (start * torch.exp(dual @ shares)).sqrt()).to(scale.dtype)
