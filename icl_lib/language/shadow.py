r"""Weights that act as if they had been edited, while nothing is copied and no parameter is touched.

A module reads ``self.weight``; an attribute of that name in the instance is found before the parameter of the module.
:func:`shadowed` puts one there for the time of a ``with``: an :class:`EditedWeight`, which answers as $W + L R^\top$
wherever the module's own forward pass multiplies by it. The parameter, the state dict and the module's class stay as
they are.
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
        raise ValueError(f"{name} of a {type(module).__name__} is edited already: leave the `with` block first.")
    vars(module)[name] = value
    try:
        yield
    finally:
        vars(module).pop(name, None)


class EditedWeight:
    r"""A matrix that answers $W z + L (R^\top z)$, or $W z$ plus a vector, under the products of a linear layer.

    Args:
        weight: the matrix, ``[out, in]``, or ``[in, out]`` as `Conv1D` keeps it.
        edit: a function of all the vectors that are read, ``[tokens, in]``, and of the answers to them without it; it
            gives what is added to each answer: a :class:`~icl_lib.low_rank.LowRank` ``[out, in]`` or
            ``[tokens, out, in]``, a tensor ``[out]`` or ``[tokens, out]``, or None.

        formed: answer by the edited matrix, formed for the time of one product: as a merged model will round.

    >>> weight = EditedWeight(torch.eye(2), lambda read, answer: LowRank(torch.ones(2, 1), torch.ones(2, 1)))
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
            f"a patched model's forward pass uses weight.{name}, which would not see the edits: this form of layer is "
            "not covered; use Patch.merged instead."
        )

    @classmethod
    def __torch_function__(cls, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = dict(zip(_PRODUCTS.get(function, ()), args, strict=False)) | (kwargs or {})
        weight, read = arguments.pop("weight", None), arguments.get("input")
        if not isinstance(weight, EditedWeight) or isinstance(read, EditedWeight):
            raise ValueError(
                f"a patched model multiplies by an edited weight with {getattr(function, '__name__', function)}, which "
                "would not see the edits: use Patch.merged, or for experts model.set_experts_implementation('eager')."
            )

        def product(matrix: Tensor) -> Tensor:
            if function is torch.addmm:
                return torch.addmm(arguments["bias"], read, matrix)
            return functional.linear(read, matrix, arguments.get("bias"))

        answer = product(weight._weight)
        flat = read.reshape(-1, read.shape[-1])
        edit = weight._edit(flat, answer.reshape(-1, answer.shape[-1]))
        if edit is None:
            return answer
        if weight._formed and isinstance(edit, LowRank):
            dense = edit.dense()
            return product(weight._weight + (dense.mT if function is torch.addmm else dense))
        return _plus(answer, flat, edit)


def _plus(answer: Tensor, flat: Tensor, edit: LowRank | Tensor) -> Tensor:
    """Add an edit's part to the answers, in place."""
    tokens = edit.batch_shape if isinstance(edit, LowRank) else edit.shape[:-1]
    if tokens and tokens.numel() != flat.shape[0]:
        raise ValueError(
            f"a patched map reads {flat.shape[0]} tokens and its patch was made for {tokens.numel()}: feed the "
            "patched model patch.bare(inputs)."
        )
    # The answer is nobody else's yet: adding to it in place saves an allocation as large as itself.
    rows = answer.view(-1, answer.shape[-1])
    if isinstance(edit, Tensor):
        rows += edit
    elif tokens and edit.left.shape[-1] == 1:
        rows.addcmul_(edit.left.squeeze(-1), (edit.right.mT @ flat.unsqueeze(-1)).squeeze(-1))
    elif tokens:
        rows += edit.matvec(flat)
    else:
        rows.addmm_(flat @ edit.right, edit.left.mT)
    return answer


_PRODUCTS = {functional.linear: ("input", "weight", "bias"), torch.addmm: ("bias", "input", "weight")}


class EditedExperts:
    """A parameter ``[expert, out, in]`` whose matrices are edited, each by what it reads.

    Args:
        weight: the parameter.
        edit: a function of the expert, of the vectors that it reads and of its answers.
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
