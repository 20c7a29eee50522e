r"""What carries the residual difference $\Delta h$ at the end of a block that has no output bias, or a norm there.

Source of the first two: Goldwaser, Munn, Gonzalvo, Dherin, *Equivalence of Context and Parameter Updates in Modern
Transformer Blocks* (arXiv 2511.17864). They are exact, but the second divides by every feature of a normed activation,
some of which are nearly zero; :func:`turning_update` does not.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.low_rank import LowRank
from icl_lib.theorem import directions, require_representable
from icl_lib.validation import (
    place,
    require_broadcastable,
    require_finite,
    require_float,
    require_same_kind,
    validated_by,
)

NEWTON_STEPS = 100
"""After which a gain that serves several vectors is taken not to exist."""


def _check_output_update(change: Any, hidden: Any) -> None:
    for name, vectors in (("change", change), ("hidden", hidden)):
        require_float(name, vectors, 1, "[*batch, width]")
        require_finite(name, vectors, "look for overflow or NaN weights before it.")
    require_same_kind("change", change, hidden=hidden)
    require_broadcastable(change=change.shape[:-1], hidden=hidden.shape[:-1])
    zero = (hidden == 0).all(-1)
    if bool(zero.any()):
        raise ValueError(
            f"hidden{place(zero)} is zero: no edit of the weights can act on a zero input. Let the change go into the "
            "bias (outer='bias')."
        )


@validated_by(_check_output_update)
def output_update(change: Float[Tensor, "*#batch out"], hidden: Float[Tensor, "*#batch in_"]) -> LowRank:
    r"""The smallest edit of the MLP's last matrix that adds a change to what it answers.

    $$\Delta W_\text{down} = \frac{\Delta h\, y^\top}{\lVert y \rVert^2}, \qquad
      (W_\text{down} + \Delta W_\text{down})\, y = W_\text{down}\, y + \Delta h .$$

    It stands in for the bias update $\Delta b' = \Delta h$ where an MLP has no bias. Source: Goldwaser, Munn, Gonzalvo,
    Dherin, *Equivalence of Context and Parameter Updates in Modern Transformer Blocks* (arXiv 2511.17864).

    Shapes: ``change`` $\Delta h$ ``[*batch, out]``, ``hidden`` $y$ ``[*batch, in]``, what the matrix reads; leading
    dimensions broadcast. Raises `ValueError` for a zero, NaN or infinite $y$, as
    :func:`icl_lib.theorem.weight_update` does.

    >>> output_update(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 2.0])).dense()
    tensor([[0.0000, 0.5000],
            [0.0000, 1.0000]])
    """
    scale, length, unit = directions(hidden)
    left = change / scale / length
    require_representable(left, "Δh/‖y‖", "y")
    return LowRank(left.unsqueeze(-1), unit.unsqueeze(-1))


def _check_scale_update(change: Any, normed: Any) -> None:
    for name, vectors in (("change", change), ("normed", normed)):
        require_float(name, vectors, 1, "[*batch, width]")
        require_finite(name, vectors, "look for overflow or NaN weights before it.")
    require_same_kind("change", change, normed=normed)
    zero = (normed == 0) & (change != 0)
    if bool(zero.any()):
        raise ValueError(
            f"normed{place(zero)} is zero: whatever its scale, this feature of the normed activation stays zero, and "
            "the change cannot be added to it. This prompt is outside what a scale can take."
        )


@validated_by(_check_scale_update)
def scale_update(
    change: Float[Tensor, "*batch dim"], normed: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    r"""The edit of a norm's scale that adds a change to what the norm answers.

    $$\Delta m = \Delta h \oslash u, \qquad (m + \Delta m) \odot u = m \odot u + \Delta h .$$

    For blocks with a norm between the MLP and the stream. Source: Goldwaser et al. (arXiv 2511.17864), for Gemma.

    Shapes: ``change`` $\Delta h$ and ``normed`` $u$, the normed activation before its scale, ``[*batch, dim]``. Raises
    `ValueError` where some $u_j$ is zero and the change is not, and where something is not finite.

    >>> scale_update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, -1.0]))
    tensor([ 0.5000, -3.0000])
    """
    scale = torch.where(change == 0, change, change / normed)
    require_representable(scale, "Δh/u", "u")
    return scale


def _check_turning(wanted: Any, read: Any, normed: Any, gain: Any, shared: Any) -> None:
    for name, vectors in (("wanted", wanted), ("read", read), ("normed", normed)):
        require_float(name, vectors, 2, "[m, dim]")
        require_finite(name, vectors, "look for overflow or NaN weights before it.")
    require_float("gain", gain, 1, "[dim]")
    for name, zero in (("gain", gain == 0), ("wanted", (wanted == 0).all(-1)), ("read", (read == 0).all(-1))):
        if bool(zero.any()):
            raise ValueError(
                f"{name}{place(zero)} is zero: the norm's answer cannot be turned where there is none; let the scale "
                "alone take the change (outer='scale')."
            )


@validated_by(_check_turning)
def turning_update(
    wanted: Float[Tensor, "m dim"],
    read: Float[Tensor, "m dim"],
    normed: Float[Tensor, "m dim"],
    gain: Tensor,
    shared: bool = False,
) -> tuple[Float[Tensor, "m dim"], Float[Tensor, "*m dim"]]:
    r"""How to change what a norm reads, and its gain, so that it answers what is wanted.

    A norm reads $x$ and answers $g \odot u$, where $u = x/\alpha$ has a given length: no $x$ alone makes it answer $t$.
    So the last matrix turns $x$ into a vector of the same length, and the gain stretches:

    $$x' = \alpha\, (t \oslash g'), \qquad g' = s\, g, \qquad
      s = \frac{\lVert t \oslash g \rVert}{\lVert u \rVert}, \qquad g' \odot u' = t .$$

    With ``shared``, one gain serves all $m$ vectors: the $g'$ nearest to $g$ (in relative entropy of $1/g'^2$) with
    $\lVert t_k \oslash g' \rVert = \lVert u_k \rVert$ for every $k$.

    Shapes: ``wanted`` $t$, ``read`` $x$ and ``normed`` $u$ ``[m, dim]``, ``gain`` $g$ ``[dim]``. Returns $x' - x$ and
    $g'$, ``[m, dim]`` or for a shared gain ``[dim]``. Raises `ValueError` where a gain is zero, and where no shared
    gain exists. Ours.

    >>> t, x, g = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0, 0.0]]), torch.ones(2)
    >>> change, gain = turning_update(t, x, x / x.square().mean().sqrt(), g)
    >>> turned = x + change
    >>> torch.allclose(gain * turned / turned.square().mean().sqrt(), t)
    True
    """
    length = torch.linalg.vector_norm(normed, dim=-1, keepdim=True)
    if shared:
        new = _shared_gain(wanted, length, gain)
    else:
        new = gain * (torch.linalg.vector_norm(wanted / gain, dim=-1, keepdim=True) / length)
    divisor = torch.linalg.vector_norm(read, dim=-1, keepdim=True) / length
    return divisor * (wanted / new) - read, new


def _shared_gain(wanted: Tensor, length: Tensor, gain: Tensor) -> Tensor:
    """Newton's method on the dual: $1/g'^2 = \\exp(A^\\top \\lambda)/g^2$, one multiplier for each vector."""
    shares = (wanted / gain / length).double().square()  # of each feature in the length of each vector
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
    # No gain, or none that rounding lets the iteration find; the norms that need one compute in float32 anyway.
    if not bool(missing.abs().max() < 1e-9):
        raise ValueError(
            f"no gain of the norm serves all {len(shares)} vectors at once: give each position its own edits, or ask "
            "with fewer tokens."
        )
    return gain * (1 / (start * torch.exp(dual @ shares)).sqrt()).to(gain.dtype)
