"""The place of an edit in a block: its path, the matrix there, and the edited matrix."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.language.shadow import EditedExperts, EditedWeight, shadowed
from icl_lib.models.anatomy import is_transposed


def split(path: str) -> tuple[str, int | None]:
    """Return the path of a map, and the number of the expert that it belongs to, or None.

    >>> split("mlp.experts.down_proj[3]"), split("mlp.down_proj")
    (('mlp.experts.down_proj', 3), ('mlp.down_proj', None))
    """
    found = re.fullmatch(r"(.*)\[(\d+)\]", path)
    return (found[1], int(found[2])) if found else (path, None)


def matrix_at(block: nn.Module, path: str) -> Tensor:
    """Return the matrix ``[out, in]`` of the map with this path: a view of the parameter, also while it is edited."""
    path, expert = split(path)
    if expert is not None:
        parent, _, name = path.rpartition(".")
        return block.get_submodule(parent)._parameters[name].detach()[expert]
    module = block.get_submodule(path)
    weight = module._parameters["weight"].detach()
    return weight.mT if is_transposed(module) else weight


def vector_at(block: nn.Module, path: str) -> Tensor:
    """Return the scale of a norm, or for a linear map a vector of the size of its bias."""
    weight = block.get_submodule(path)._parameters["weight"].detach()
    return weight if weight.ndim == 1 else matrix_at(block, path)[:, 0]


def edited(
    block: nn.Module, path: str, edit: Callable[[Tensor, Tensor], Any], formed: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Inside the ``with``, this map has an edited weight; see :class:`~icl_lib.language.shadow.EditedWeight`."""
    module = block.get_submodule(path)
    return shadowed(module, "weight", EditedWeight(module.weight, edit, formed))


def edited_experts(
    block: nn.Module, path: str, edit: Callable[[int, Tensor, Tensor], Any], formed: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Do the same for a parameter that holds the matrices of all experts."""
    parent, _, name = path.rpartition(".")
    module = block.get_submodule(parent)
    return shadowed(module, name, EditedExperts(getattr(module, name), edit, formed))


class FullScale(nn.Parameter):
    """A norm's scale in float64 that stays in float64.

    Gemma's norm uses ``weight.float()`` in every precision. Rounded to float32, an edited scale would be exact to 1e-7
    only. The method ``float`` of this class returns the scale as it is. Saved and loaded again, it is an ordinary
    parameter.
    """

    def float(self) -> Tensor:
        """Return the scale as it is."""
        return self.as_subclass(Tensor)


def full_scale(scale: Tensor) -> nn.Parameter:
    """Return the scale as a parameter that keeps its digits in float64; see :class:`FullScale`."""
    return (FullScale if scale.dtype == torch.float64 else nn.Parameter)(scale, requires_grad=False)


@contextlib.contextmanager
def rescaled(norm: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Inside the ``with``, the scale of a norm is edited; ``edit`` returns $\\Delta\\gamma$ for the norm's input."""
    scale = norm.weight.detach()

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        change = edit(args[0])
        if math.prod(change.shape[:-1]) not in (1, math.prod(args[0].shape[:-1])):
            raise ValueError(
                f"an edited norm reads {math.prod(args[0].shape[:-1])} tokens, but its edit was made for "
                f"{math.prod(change.shape[:-1])}: call the edited model with patch.bare(inputs)."
            )
        change = change.view_as(args[0]) if change.ndim > 1 else change
        vars(norm)["weight"] = full_scale(scale + change)

    hook = norm.register_forward_pre_hook(before)
    try:
        with shadowed(norm, "weight", scale):
            yield
    finally:
        hook.remove()
