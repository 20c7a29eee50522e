r"""Can the parameters of a part of a block make up for a change of what the part reads, or add a vector to its output?

Let a block output $h + g_\varphi(f_\theta(z))$, where $z$ is what its MLP reads. The *inner* part $f_\theta$ is input
controllable if for all $z_0$ and $z_C$ there are parameters $\theta'$ with $f_{\theta'}(z_0) = f_\theta(z_C)$. The
*outer* part $g_\varphi$ is output controllable if for all $y$ and $\Delta h$ there are $\varphi'$ with
$g_{\varphi'}(y) = g_\varphi(y) + \Delta h$. With both, edits of the block replace its context exactly.

Source: Goldwaser et al. (arXiv 2511.17864), Definitions 3 and 4 and the theorem on them, which we know second-hand. The
search for the parameters is this library's own.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from icl_lib.validation import require_float, require_instance, require_same_kind, require_size


@dataclass(frozen=True, eq=False)
class Control:
    r"""The result of a search for parameters; made by :func:`input_control` and :func:`output_control`.

    Attributes:
        edited: a copy of the module with the parameters that were found.
        missed: the distance of its output from the wanted one, divided by the length of the wanted one
            if that is not zero.
        norm: the length of the change of all parameters, taken as one vector.
    """

    edited: nn.Module
    missed: float
    norm: float


def input_control(module: nn.Module, without: Tensor, with_: Tensor, steps: int = 50) -> Control:
    r"""Search for parameters with which a module outputs for one vector what it outputs for another.

    $$f_{\theta'}(z_0) = f_\theta(z_C)$$

    Steps of Gauss and Newton, each the shortest. Where the output is linear in the parameters, one step is enough, and
    the change is the smallest of all that have the effect: for a linear map without a bias it is
    :func:`icl_lib.theorem.weight_update`. A search that ends with ``missed`` near zero proves that there are such
    parameters. One that does not proves nothing by itself.

    Args:
        module: any module that takes one vector, and returns a vector or several. Only its parameters are edited, in a
            copy.
        without: $z_0$, ``[in]``.
        with_: $z_C$, ``[in]``.
        steps: how many steps are made at most.

    Raises `ValueError` for a module without parameters, and for vectors that do not match.

    >>> linear = nn.Linear(3, 2).double()
    >>> z_0, z_C = torch.tensor([1.0, 0.0, 0.0]).double(), torch.tensor([0.0, 2.0, 0.0]).double()
    >>> found = input_control(linear, z_0, z_C)
    >>> found.missed < 1e-14, torch.allclose(found.edited(z_0), linear(z_C))
    (True, True)
    """
    _require(module, steps, without=without, with_=with_)
    with torch.no_grad():
        wanted = _output(module(with_))
    return _search(module, without, wanted, steps)


def output_control(module: nn.Module, hidden: Tensor, change: Tensor, steps: int = 50) -> Control:
    r"""Search for parameters with which a module adds a given vector to its output.

    $$g_{\varphi'}(y) = g_\varphi(y) + \Delta h$$

    Args:
        module, steps: as for :func:`input_control`.
        hidden: $y$, ``[in]``.
        change: $\Delta h$, ``[out]``.

    Raises `ValueError` as :func:`input_control` does, and for a change that the output cannot be added to.

    >>> norm = nn.RMSNorm(3).double()                # its scale multiplies entries, and the second one is zero
    >>> y = torch.tensor([1.0, 0.0, 2.0]).double()
    >>> [output_control(norm, y, change.double()).missed < 1e-12 for change in torch.eye(3)]
    [True, False, True]
    """
    _require(module, steps, hidden=hidden, change=change)
    with torch.no_grad():
        output = _output(module(hidden))
    if output.shape != change.shape:
        raise ValueError(f"change has shape {tuple(change.shape)}, and the output {tuple(output.shape)}: give [out].")
    return _search(module, hidden, output + change, steps)


def _require(module: Any, steps: Any, **vectors: Tensor) -> None:
    require_instance("module", module, nn.Module, "give a torch.nn.Module.")
    require_size("steps", steps)
    for name, vector in vectors.items():
        require_float(name, vector, 1, "[width]")
        if vector.ndim != 1:
            raise ValueError(f"{name} has shape {tuple(vector.shape)}: give one vector, [width].")
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ValueError("module has no parameters, so nothing of it can be edited: give one that has.")
    require_same_kind("module", parameter, **vectors)


def _output(output: Any) -> Tensor:
    """All vectors that a module returns, one behind the other."""
    return torch.cat([part.flatten() for part in output]) if isinstance(output, tuple) else output.flatten()


def _search(module: nn.Module, read: Tensor, wanted: Tensor, steps: int) -> Control:
    names = [name for name, _ in module.named_parameters()]
    shapes = [parameter.shape for parameter in module.parameters()]
    start = parameters_to_vector(module.parameters()).detach()
    length = wanted.norm().item() or 1.0

    def output(parameters: Tensor) -> Tensor:
        parts = parameters.split([shape.numel() for shape in shapes])
        given = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return _output(functional_call(module, given, (read,)))

    def missed(parameters: Tensor) -> float:
        return (output(parameters) - wanted).norm().item() / length

    with torch.no_grad():
        now = start
        for _ in range(steps):
            step = torch.linalg.pinv(jacrev(output)(now)) @ (wanted - output(now))
            halved = [now + step / 2**half for half in range(30)]
            better = next((tried for tried in halved if missed(tried) < missed(now)), None)
            if better is None:  # rounding error, or no way down
                break
            now = better
        edited = copy.deepcopy(module)
        vector_to_parameters(now, edited.parameters())
        return Control(edited, missed(now), (now - start).norm().item())
