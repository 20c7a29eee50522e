r"""Weights that act as if they were edited, without a copy and without a change of any parameter.

A module reads ``self.weight``. Python finds an instance attribute of this name before the parameter of the module.
:func:`shadowed` sets such an attribute inside a ``with``: an :class:`EditedWeight`, which acts as $W + L R^\top$ in the
products of the module's own forward pass. The parameter, the state dict and the class of the module do not change.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from icl_lib.low_rank import LowRank


class Product(NamedTuple):
    """One product of a weight in a forward pass.

    Attributes:
        weight: the matrix, ``[out, in]``.
        read: its inputs, ``[*tokens, in]``.
        output: its outputs without the edit, ``[*tokens, out]``.
        transposed: whether the parameter holds the matrix as ``[in, out]``.
    """

    weight: Tensor
    read: Tensor
    output: Tensor
    transposed: bool


Edit = Callable[[Product], "LowRank | Tensor | None"]


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
        weight: the matrix as the parameter holds it.
        edit: a function of a :class:`Product`. It returns the edit: a :class:`~icl_lib.low_rank.LowRank` ``[out, in]``
            or ``[*tokens, out, in]``, or a tensor ``[out]`` or ``[*tokens, out]`` that is added to the outputs, or
            None.
        dense: form the edited matrix for each product, so that it rounds as a merged model does.
        name: the place of the weight, for error messages.

    >>> weight = EditedWeight(torch.eye(2), lambda product: LowRank(torch.ones(2, 1), torch.ones(2, 1)))
    >>> functional.linear(torch.tensor([[1.0, 2.0]]), weight)
    tensor([[4., 5.]])
    """

    is_edited = True
    _SAFE = frozenset({"dtype", "device", "shape", "ndim", "is_cuda", "is_meta", "requires_grad", "size", "dim"})

    def __init__(self, weight: Tensor, edit: Edit, dense: bool = False, name: str = "an edited map") -> None:
        self._weight, self._edit, self._dense, self._name = weight, edit, dense, name
        self._parameter, self._flipped = weight, False  # before the forward pass casts or transposes it

    def _with(self, weight: Tensor, flipped: bool) -> EditedWeight:
        other = EditedWeight(weight, self._edit, self._dense, self._name)
        other._parameter, other._flipped = self._parameter, flipped
        return other

    def _flip(self) -> EditedWeight:
        return self._with(self._weight.mT, not self._flipped)

    T = mT = property(_flip)

    def t(self) -> EditedWeight:
        """Return the transpose."""
        return self._flip()

    def to(self, *args: Any, **kwargs: Any) -> EditedWeight:
        """Return the edited weight in another dtype or on another device, as `torch.Tensor.to` does."""
        return self._with(self._weight.to(*args, **kwargs), self._flipped)

    type = to

    def float(self) -> EditedWeight:
        """Return the edited weight in float32."""
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        if name in EditedWeight._SAFE:
            return getattr(self._weight, name)
        raise AttributeError(
            f"the forward pass uses weight.{name}, which would ignore the edit: this kind of layer is not supported "
            "here; use Patch.merged instead."
        )

    def __rmatmul__(self, read: Tensor) -> Tensor:
        return torch.matmul(read, self)

    @classmethod
    def __torch_function__(cls, function: Callable, _: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        arguments = dict(zip(_PRODUCTS.get(function, ()), args, strict=False)) | (kwargs or {})
        weight, read, bias = (arguments.get(name) for name in ("weight", "input", "bias"))
        if not isinstance(weight, EditedWeight) or isinstance(read, EditedWeight):
            raise ValueError(
                f"the forward pass uses an edited weight in {getattr(function, '__name__', function)}, which would "
                "ignore the edit: use Patch.merged, or for experts model.set_experts_implementation('eager')."
            )
        # All products but `linear` multiply from the right: with the matrix as [in, out].
        turned = function is not functional.linear
        matrix = weight._weight.mT if turned else weight._weight
        output = _product(function, read, weight._weight, bias)
        transposed = turned != weight._flipped
        edit = weight._edit(Product(matrix, read, output, transposed))
        if edit is None:
            return output
        if isinstance(edit, LowRank) and weight._dense:
            merged = weight._parameter + (edit.dense().mT if transposed else edit.dense())
            merged = merged.mT if weight._flipped else merged
            return _product(function, read, merged.to(weight.dtype), bias)
        return _plus(output, read, edit.to(output.dtype), weight._name)


def _product(function: Callable, read: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    if function is torch.addmm:
        return torch.addmm(bias, read, matrix)
    return functional.linear(read, matrix, bias) if function is functional.linear else torch.matmul(read, matrix)


def _plus(output: Tensor, read: Tensor, edit: LowRank | Tensor, name: str) -> Tensor:
    """Add the contribution of an edit to the outputs; a single input may have several edits, one for each position."""
    batch = edit.batch_shape if isinstance(edit, LowRank) else edit.shape[:-1]
    tokens = output.shape[:-1]
    # No other code holds the output yet, so adding in place is safe and saves memory.
    if not batch:
        if isinstance(edit, Tensor):
            return output.add_(edit)
        return (
            output.view(-1, output.shape[-1])
            .addmm_(read.reshape(-1, read.shape[-1]) @ edit.right, edit.left.mT)
            .view_as(output)
        )
    if batch.numel() == tokens.numel():
        if isinstance(edit, Tensor):
            return output.add_(edit.reshape(output.shape))
        rows, flat = output.view(-1, output.shape[-1]), read.reshape(-1, read.shape[-1])
        edit = flattened(edit)
        if edit.left.shape[-1] == 1:
            rows.addcmul_(edit.left.squeeze(-1), (edit.right.mT @ flat.unsqueeze(-1)).squeeze(-1))
        else:
            rows += edit.matvec(flat)
        return output
    if len(batch) == len(tokens) and batch[:-1] == tokens[:-1] and tokens[-1] == 1:
        return output + edit if isinstance(edit, Tensor) else edit.addmv(output, read)
    raise ValueError(
        f"{name} reads {tokens.numel()} tokens, but its edit was made for {batch.numel()}: call the edited model with "
        "patch.bare(inputs)."
    )


def flattened(edit: LowRank) -> LowRank:
    """Return the edit with a single leading dimension."""
    if len(edit.shape) == 3:
        return edit
    return LowRank(*(factor.flatten(0, -3) for factor in (edit[...].left, edit[...].right)))


_PRODUCTS = {functional.linear: ("input", "weight", "bias"), torch.addmm: ("bias", "input", "weight")}
_PRODUCTS |= dict.fromkeys((torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__), ("input", "weight"))


class EditedExperts:
    """A parameter with one matrix for each expert, whose matrices are edited.

    Args:
        weight: the parameter.
        edit: a function of the number of the expert and of a :class:`Product`; see :class:`EditedWeight`.
        dense, name: see :class:`EditedWeight`.
    """

    is_edited = True

    def __init__(
        self, weight: Tensor, edit: Callable[[int, Product], Any], dense: bool = False, name: str = "an edited map"
    ) -> None:
        self._weight, self._edit, self._dense, self._name = weight, edit, dense, name

    def __getitem__(self, expert: Any) -> EditedWeight:
        number = int(expert)
        edit = functools.partial(self._edit, number)
        return EditedWeight(self._weight[number], edit, self._dense, f"{self._name}[{number}]")

    def __getattr__(self, name: str) -> Any:
        if name in EditedWeight._SAFE:
            return getattr(self._weight, name)
        raise AttributeError(
            f"the forward pass uses the weights of all experts at once (.{name}), but each needs its own edit: use "
            "Patch.merged, or model.set_experts_implementation('eager')."
        )

    @classmethod
    def __torch_function__(cls, function: Callable, *_: Any) -> Any:
        return EditedWeight.__torch_function__(function, ())


def split(path: str) -> tuple[str, int | None]:
    """Return the path of a map, and the number of the expert that it belongs to, or None.

    >>> split("mlp.experts.down_proj[3]"), split("mlp.down_proj")
    (('mlp.experts.down_proj', 3), ('mlp.down_proj', None))
    """
    found = re.fullmatch(r"(.*)\[(\d+)\]", path)
    return (found[1], int(found[2])) if found else (path, None)


def holder_of(block: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module and the name of the parameter of a map: its ``weight``, or a parameter of experts."""
    parent, _, name = path.rpartition(".")
    module = block.get_submodule(parent)
    return (module, name) if name in module._parameters else (block.get_submodule(path), "weight")


def parameter_at(block: nn.Module, path: str) -> Tensor:
    """Return the parameter of the map, norm or expert with this path, also while it is edited."""
    path, expert = split(path)
    module, name = holder_of(block, path)
    weight = module._parameters[name].detach()
    return weight if expert is None else weight[expert]


def edited(
    where: str, block: nn.Module, path: str, edit: Callable[..., Any], dense: bool = False
) -> contextlib.AbstractContextManager[None]:
    """Inside the ``with``, this map of the block ``where`` has an edited weight.

    For a parameter of experts, ``edit`` is also given the number of the expert.
    """
    module, name = holder_of(block, path)
    weight = getattr(module, name)
    kind = EditedWeight if weight.ndim == 2 else EditedExperts
    return shadowed(module, name, kind(weight, edit, dense, f"{where}.{path}"))


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
def edited_norm(
    where: str, block: nn.Module, path: str, edit: Callable[[Tensor], Tensor], of_bias: bool = False
) -> Iterator[None]:
    r"""Inside the ``with``, the scale of a norm, or its bias, is edited; ``edit`` returns the edit for its input.

    With a scale $\gamma + \Delta\gamma$ the norm outputs $\Delta\gamma \odot \bar o$ more, and with a bias
    $\beta + \Delta\beta$ it outputs $\Delta\beta$ more.
    """
    norm = block.get_submodule(path)
    scale = norm.weight.detach()
    one_scale = isinstance(norm, (nn.LayerNorm, nn.RMSNorm))  # these take no scale for each token
    change: Tensor | None = None

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal change
        change = edit(args[0])
        tokens, made_for = (math.prod(one.shape[:-1]) for one in (args[0], change))
        if made_for not in (1, tokens):
            raise ValueError(
                f"{where}.{path} reads {tokens} tokens, but its edit was made for {made_for}: call the edited model "
                "with patch.bare(inputs)."
            )
        change = change.reshape(args[0].shape) if change.ndim > 1 else change
        if not of_bias and not (one_scale and change.ndim > 1):
            vars(norm)["weight"] = full_scale(scale + change)

    def after(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if of_bias:
            return output + change
        return output + change * parts_of(norm, args[0]).normed if one_scale and change.ndim > 1 else None

    with shadowed(norm, "weight", scale), contextlib.ExitStack() as stack:
        stack.callback(norm.register_forward_pre_hook(before).remove)
        stack.callback(norm.register_forward_hook(after).remove)
        yield


class NormParts(NamedTuple):
    r"""The output $\gamma \odot \bar o$ of a norm without its bias, $\bar o$, and $\gamma$ (Gemma: 1 + weight)."""

    output: Tensor
    normed: Tensor
    scale: Tensor


def parts_of(norm: nn.Module, read: Tensor) -> NormParts:
    """Return the parts of a norm's output, found by running the norm with parameters of zero and one."""
    twin = copy.copy(norm)  # shares everything but its attributes' dictionary
    scale = norm._parameters["weight"].detach()

    def scaled_by(weight: Tensor) -> Tensor:
        vars(twin)["weight"] = weight
        output = type(norm).forward(twin, read)
        return output if norm._parameters.get("bias") is None else output - norm.bias.detach()

    base = scaled_by(torch.zeros_like(scale))
    offset = float(bool((base != 0).any()))
    return NormParts(scaled_by(scale), scaled_by(torch.ones_like(scale)) - base, scale + offset)
