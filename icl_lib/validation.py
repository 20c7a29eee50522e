"""Checks of arguments: each error names the argument, the place in it, the cause and the remedy.

The public functions annotate the shapes of their arguments, and the tests check these annotations at run time. A
caller's mistake must raise a `ValueError` with a remedy whether or not annotations are checked. So the checks here run
before the annotated function is called: see :func:`validated_by`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def validated_by(check: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Call ``check`` with the arguments of the decorated function before the function itself.

    The two have the same signature.

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
    """Return the index of the first true entry of ``mask``, as text; an empty text for a single value.

    >>> place(torch.tensor([[False, False], [True, False]]))
    '[1, 0]'
    >>> place(torch.tensor(True))
    ''
    """
    return str(mask.nonzero()[0].tolist()) if mask.ndim else ""


def require_size(name: str, size: Any, least: int = 1) -> None:
    """Require that ``size`` is a whole number of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(f"{name} is {size!r}: give a whole number of at least {least}.")


def require_float(name: str, tensor: Any, dims: int, layout: str) -> None:
    """Require a floating-point tensor with at least ``dims`` dimensions, on a device that holds values."""
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name} is a {type(tensor).__name__}: give a torch.Tensor {layout} (torch.as_tensor converts a list)."
        )
    if not tensor.is_floating_point():
        raise ValueError(
            f"{name} has dtype {tensor.dtype}: give a floating-point tensor, for example {name}.to(torch.float64)."
        )
    if tensor.is_meta:
        raise ValueError(f"{name}.device is meta, where tensors hold no values: materialise it, and load its values.")
    if tensor.ndim < dims:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, fewer than {dims} dimensions: give a tensor {layout}."
        )


def require_same_kind(reference: str, like: Any, **tensors: Any) -> None:
    """Require that each tensor, or other object with a dtype and a device, has the dtype and the device of ``like``."""
    for name, tensor in tensors.items():
        for attribute in ("dtype", "device"):
            have, want = getattr(tensor, attribute), getattr(like, attribute)
            if have != want:
                raise ValueError(
                    f"{name}.{attribute} is {have} but {reference}.{attribute} is {want}, and they must be the same: "
                    f"convert one of them, for example with {name}.to({reference}.{attribute})."
                )


def require_finite(name: str, tensor: Tensor, remedy: str) -> None:
    """Require that every entry of ``tensor`` is a finite number."""
    # If an entry is NaN or infinite, so is the minimum or the maximum; computing these two is many times faster than
    # testing each entry.
    if tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        where = place(~torch.isfinite(tensor))
        value = tensor[~torch.isfinite(tensor)][0].item()
        raise ValueError(f"{name}{where} is {value}: {remedy}")


def require_broadcastable(**shapes: tuple[int, ...]) -> None:
    """Require that the leading (batch) shapes broadcast against each other."""
    try:
        torch.broadcast_shapes(*shapes.values())
    except RuntimeError:
        listed = " and ".join(f"{name} has {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"the leading dimensions do not broadcast: {listed}. Make them equal, or 1 where one value is used for all."
        ) from None
