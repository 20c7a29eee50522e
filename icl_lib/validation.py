"""Checks of arguments: each error names the argument, the place in it, the cause and the remedy.

A function calls them at the beginning of its body, so a caller's mistake raises a `ValueError` before anything is
changed. Annotations are checked in the tests only, and after the body has run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def place(mask: Tensor) -> str:
    """Return the index of the first true entry of ``mask``, as text; an empty text for a single value.

    >>> place(torch.tensor([[False, False], [True, False]]))
    '[1, 0]'
    >>> place(torch.tensor(True))
    ''
    """
    return str(mask.nonzero()[0].tolist()) if mask.ndim else ""


def require_nowhere(name: str, bad: Tensor, problem: str, error: type[ValueError] = ValueError) -> None:
    """Require that no entry of the mask ``bad`` is true; the error names the first such place and the problem.

    >>> require_nowhere("weight", torch.tensor([False, True]), "is zero: give another weight.")
    Traceback (most recent call last):
    ValueError: weight[1] is zero: give another weight.
    """
    if bool(bad.any()):
        raise error(f"{name}{place(bad)} {problem}")


def require_instance(name: str, value: Any, kind: type, remedy: str) -> None:
    """Require that ``value`` is an instance of ``kind``."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is a {type(value).__name__}: {remedy}")


def require_size(name: str, size: Any, least: int = 1) -> None:
    """Require that ``size`` is a whole number of at least ``least``."""
    if isinstance(size, bool) or not isinstance(size, int) or size < least:
        raise ValueError(f"{name} is {size!r}: give a whole number of at least {least}.")


def require_float(name: str, tensor: Any, dims: int, layout: str) -> None:
    """Require a floating-point tensor with at least ``dims`` dimensions, on a device that holds values."""
    require_instance(name, tensor, Tensor, f"give a torch.Tensor {layout} (torch.as_tensor converts a list).")
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
    if tensor.numel() and not all(map(math.isfinite, torch.stack(tensor.aminmax()).tolist())):
        bad = ~torch.isfinite(tensor)
        require_nowhere(name, bad, f"is {tensor[bad][0].item()}: {remedy}")


def require_broadcastable(**shapes: Sequence[int]) -> torch.Size:
    """Require that the leading (batch) shapes broadcast against each other, and return the shape that results.

    >>> require_broadcastable(left=(2, 1), right=(3,))
    torch.Size([2, 3])
    """
    # torch.broadcast_shapes takes ten times as long.
    sizes = [{*each} - {1} for each in itertools.zip_longest(*map(reversed, shapes.values()), fillvalue=1)]
    if any(len(different) > 1 for different in sizes):
        listed = " and ".join(f"{name} has {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"the leading dimensions do not broadcast: {listed}. Make them equal, or 1 where one value is used for all."
        )
    return torch.Size(max(different, default=1) for different in reversed(sizes))
