"""Errors that name the argument, the place in it, and the remedy.

The public functions annotate the shapes they expect, and the tests check these annotations. A caller's mistake must
meet a `ValueError` with a remedy whether or not annotations are checked, so validation runs outside the annotated
function: see :func:`validated_by`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def validated_by(check: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Run ``check`` on the arguments of the decorated function first; the two share one signature.

    >>> def positive(x):
    ...     if x <= 0:
    ...         raise ValueError(f"x is {x}: give a positive number.")
    >>> @validated_by(positive)
    ... def log2(x):
    ...     return x.bit_length() - 1
    >>> log2(x=8)
    3
    >>> log2(0)
    Traceback (most recent call last):
    ValueError: x is 0: give a positive number.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def validated(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            check(*bound.args, **bound.kwargs)
            return function(*args, **kwargs)

        return validated

    return decorate


def place(mask: Tensor) -> str:
    """The first place where ``mask`` is true, written as an index.

    >>> place(torch.tensor([[False, False], [True, False]]))
    '[1, 0]'
    >>> place(torch.tensor(True))
    ''
    """
    return str(mask.nonzero()[0].tolist()) if mask.ndim else ""


def require_size(name: str, size: Any, least: int = 1) -> None:
    """Require a whole number of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(f"{name} is {size!r}: give a whole number of at least {least}.")


def require_float(name: str, tensor: Any, dims: int, layout: str) -> None:
    """Require a floating-point tensor that holds numbers, with at least ``dims`` dimensions."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}: give a torch.Tensor {layout} (torch.as_tensor makes one)."
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{name} has dtype {tensor.dtype}: convert it with {name}.to(torch.float64).")
    if tensor.is_meta:
        raise ValueError(f"{name}.device is meta, where tensors hold no numbers: materialise it first.")
    if tensor.ndim < dims:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {tensor.ndim} of at least {dims} dimensions: it must be {layout}."
        )


def require_same_kind(reference: str, like: Any, **tensors: Any) -> None:
    """Require each tensor (or anything with a dtype and a device) to have those of ``like``."""
    for name, tensor in tensors.items():
        for attribute in ("dtype", "device"):
            have, want = getattr(tensor, attribute), getattr(like, attribute)
            if have != want:
                raise ValueError(
                    f"{name}.{attribute} is {have} but {reference}.{attribute} is {want}: "
                    f"convert one, for example with {name}.to({reference}.{attribute})."
                )


def require_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """Require every entry of ``tensor`` to be a finite number."""
    # The extremes are NaN or infinite if any entry is; finding them is many times faster than testing every entry.
    if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        where = place(~torch.isfinite(tensor))
        value = tensor[~torch.isfinite(tensor)][0].item()
        raise ValueError(f"{name}{where} is {value}: {remedy}")


def require_broadcastable(**shapes: tuple[int, ...]) -> None:
    """Require the leading (batch) shapes to broadcast against each other."""
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = ", ".join(f"{name} has {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"leading dimensions do not broadcast: {listed}. Make them equal, or 1 where one value serves all."
        ) from None
