r"""Weights that act as if they were edited, without a copy and without a change of any parameter.

A module reads ``self.weight``. Python finds an instance attribute of this name before the parameter of the module.
:func:`shadowed` sets such an attribute inside a ``with``: an :class:`EditedWeight`, which acts as $W + L R^\top$ in the
products of the module's own forward pass. The parameter, the state dict and the class of the module do not change.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from icl_lib.low_rank import LowRank

Edit = Callable[[Tensor, Tensor], "LowRank | Tensor | None"]


@contextlib.contextmanager
def shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Inside the ``with``, ``module.name`` is ``value``.

    >>> linear = nn.Linear(2, 2, bias=False)
    >>> with shadowed(linear, "weight", torch.zeros(2, 2)):
    ...     linear(torch.ones(2))
    tensor([0., 0.])
    >>> "weight" in vars(linear)
    False
    """
    if name in vars(module):
        raise ValueError(f"{name} of a {type(module).__name__} is already edited: leave the `with` block first.")
    vars(module)[name] = value
    try:
        yield
    finally:
        vars(module).pop(name, None)


class EditedWeight:
    r"""A matrix whose product with $z$ is $W z + L (R^\top z)$, or $W z$ plus a vector.

    Args:
        weight: the matrix, ``[out, in]``, or ``[in, out]`` in a `Conv1D`.
        edit: a function of the inputs ``[tokens, in]`` and of the outputs without the edit. It returns the edit: a
            :class:`~icl_lib.low_rank.LowRank` ``[out, in]`` or ``[tokens, out, in]``, or a tensor ``[out]`` or
            ``[tokens, out]`` that is added to the outputs, or None.
        formed: form the edited matrix for each product, so that it rounds as a merged model does.

    >>> weight = EditedWeight(torch.eye(2), lambda read, output: LowRank(torch.ones(2, 1), torch.ones(2, 1)))
    >>> functional.linear(torch.tensor([[1.0, 2.0]]), weight)
    tensor([[4., 5.]])
    """

    _SAFE = frozenset({"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "dim"})

    def __init__(self, weight: Tensor, edit: Edit, formed: bool = False) -> None:
        self._weight, self._edit, self._formed = weight, edit, formed

    def __getattr__(self, name: str) -> Any:
        if name in EditedWeight._SAFE:
            return getattr(self._weight, name)
        raise AttributeError(
            f"the forward pass uses weight.{name}, which would ignore the edit: this kind of layer is not supported "
            "here; use Patch.merged instead."
        )

    @classmethod
    def __torch_function__(cls, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = dict(zip(_PRODUCTS.get(function, ()), args, strict=False)) | (kwargs or {})
        weight, read = arguments.pop("weight", None), arguments.get("input")
        if not isinstance(weight, EditedWeight) or isinstance(read, EditedWeight):
            raise ValueError(
                f"the forward pass uses an edited weight in {getattr(function, '__name__', function)}, which would "
                "ignore the edit: use Patch.merged, or for experts model.set_experts_implementation('eager')."
            )

        def product(matrix: Tensor) -> Tensor:
            if function is torch.addmm:
                return torch.addmm(arguments["bias"], read, matrix)
            return functional.linear(read, matrix, arguments.get("bias"))

        output = product(weight._weight)
        flat = read.reshape(-1, read.shape[-1])
        edit = weight._edit(flat, output.reshape(-1, output.shape[-1]))
        if edit is None:
            return output
        if weight._formed and isinstance(edit, LowRank):
            dense = edit.dense()
            return product(weight._weight + (dense.mT if function is torch.addmm else dense))
        return _plus(output, flat, edit)


def _plus(output: Tensor, flat: Tensor, edit: LowRank | Tensor) -> Tensor:
    """Add the contribution of an edit to the outputs, in place."""
    tokens = edit.batch_shape if isinstance(edit, LowRank) else edit.shape[:-1]
    if tokens and tokens.numel() != flat.shape[0]:
        raise ValueError(
            f"an edited map reads {flat.shape[0]} tokens, but its edit was made for {tokens.numel()}: call the edited "
            "model with patch.bare(inputs)."
        )
    # No other code holds the output yet, so adding in place is safe and saves memory.
    rows = output.view(-1, output.shape[-1])
    if isinstance(edit, Tensor):
        rows += edit
    elif tokens and edit.left.shape[-1] == 1:
        rows.addcmul_(edit.left.squeeze(-1), (edit.right.mT @ flat.unsqueeze(-1)).squeeze(-1))
    elif tokens:
        rows += edit.matvec(flat)
    else:
        rows.addmm_(flat @ edit.right, edit.left.mT)
    return output


_PRODUCTS = {functional.linear: ("input", "weight", "bias"), torch.addmm: ("bias", "input", "weight")}


class EditedExperts:
    """A parameter ``[expert, out, in]`` whose matrices are edited.

    Args:
        weight: the parameter.
        edit: a function of the number of the expert, its inputs and its outputs; see :class:`EditedWeight`.
        formed: see :class:`EditedWeight`.
    """

    def __init__(self, weight: Tensor, edit: Callable[[int, Tensor, Tensor], Any], formed: bool = False) -> None:
        self._weight, self._edit, self._formed = weight, edit, formed

    def __getitem__(self, expert: Any) -> EditedWeight:
        number = int(expert)
        return EditedWeight(self._weight[number], functools.partial(self._edit, number), self._formed)

    @classmethod
    def __torch_function__(cls, function: Callable, *_: Any) -> Any:
        return EditedWeight.__torch_function__(function, ())
