"""Hooks that record what a block reads and outputs, without changing it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from icl_lib.models.anatomy import Anatomy


def on_stream(stack: contextlib.ExitStack, block: nn.Module, anatomy: Anatomy, see: Callable[[Tensor], Any]) -> None:
    """Call ``see`` with $h$ (in a parallel block, with the output of the attention) until the stack is closed."""
    place = block.get_submodule(anatomy.stream)
    if anatomy.parallel:
        hook = place.register_forward_hook(lambda _, __, output: see(_tensor(output)))
    else:
        hook = place.register_forward_pre_hook(
            lambda _, args, kwargs: see(_tensor((*args, *kwargs.values()))), with_kwargs=True
        )
    stack.callback(hook.remove)


def on_output(stack: contextlib.ExitStack, block: nn.Module, see: Callable[[Tensor], Any]) -> None:
    """Call ``see`` with the stream after the block, until the stack is closed."""

    def after(_: nn.Module, __: Any, output: Any) -> None:
        see(_tensor(output))

    stack.callback(block.register_forward_hook(after).remove)


def _tensor(output: Any) -> Tensor:
    """Return the tensor itself, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]
