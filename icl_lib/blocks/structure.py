r"""Test whether a module has the form $f_\theta(W a + b)$.

The theorem needs an MLP whose input reaches its output only through its first linear map. A module does not say whether
this holds, so a copy of it is run: with random weights, and with the output of its first linear map held fixed. This is
a test on generic inputs and weights, not a proof.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

REMEDY = "Give an MLP that reads its input only through its first linear map, which the theorem edits."


def first_and_last_linear(mlp: nn.Module, output_bias: bool) -> tuple[str, str]:
    """The names, inside ``mlp``, of the linear map that reads its input and of the last linear map.

    Args:
        mlp: only copies of it are run; it does not change, and neither does the random generator.
        output_bias: require that the output of the last linear map is the output of ``mlp``.

    Raises `ValueError` for a module of another form; the message gives the reason.

    >>> first_and_last_linear(nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 4)), output_bias=True)
    ('0', '2')
    """
    widths = {module.in_features: None for module in mlp.modules() if isinstance(module, nn.Linear)}
    if not widths:
        raise ValueError(f"mlp has no torch.nn.Linear. {REMEDY}")
    if any(tensor.is_meta for tensor in mlp.parameters()):
        raise ValueError("mlp has parameters on the meta device, which hold no values: materialise it first.")
    devices = [tensor.device for tensor in mlp.parameters() if tensor.is_cuda]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(0)
        return _probed(mlp, list(widths), output_bias)


def require_deterministic(module: nn.Module, argument: str) -> None:
    """Raise a `ValueError` for dropout or batch norm in training mode: their outputs differ from run to run."""
    for name, part in module.named_modules():
        rate = getattr(part, "p" if isinstance(part, nn.modules.dropout._DropoutNd) else "dropout", 0)
        drops = isinstance(rate, float) and rate != 0
        if part.training and (drops or isinstance(part, nn.modules.batchnorm._BatchNorm)):
            raise ValueError(
                f"{argument}.{name} is a {type(part).__name__} in training mode, so its output differs from run to "
                f"run: call {argument}.eval() first."
            )


def _probed(mlp: nn.Module, widths: list[int], output_bias: bool) -> tuple[str, str]:
    twin = _generic_copy(mlp)
    inputs, runs, output = _run_in_order(twin, widths)
    if not runs:
        raise ValueError(f"mlp runs none of its torch.nn.Linear maps. {REMEDY}")
    (first, read, answer), (last, *_) = runs[0], runs[-1]
    linear = twin.get_submodule(first)
    named = f"mlp's first linear map ({first or 'the module itself'})"
    if not _same(read, inputs):
        raise ValueError(f"{named} does not read mlp's input as it is: move the layers before it out of mlp.")
    if [name for name, *_ in runs].count(first) > 1:
        raise ValueError(f"{named} runs more than once in a forward pass. {REMEDY}")
    if not torch.allclose(answer, nn.functional.linear(read, linear.weight, linear.bias), rtol=1e-2):
        raise ValueError(f"{named} computes more than W a + b (an adapter or a hook?): merge or remove this first.")

    # With the output of the first map held fixed, a difference must come from another path.
    held = torch.randn_like(answer) * torch.logspace(-2, 2, answer.shape[-1]).to(answer)
    by_input = [_held(twin, first, held, x) for x in (inputs, torch.randn_like(inputs) - inputs)]
    if not _same(*by_input):
        raise ValueError(
            f"mlp's output depends on its input not only through its first linear map ({first}), but also through a "
            "gate or a skip connection inside, for example, so the edit of this map alone is not exact. For a skip "
            "around the block, use skip=True."
        )
    if first:
        other = nn.Linear(*reversed(linear.weight.shape), bias=linear.bias is not None).to(linear.weight)
        twin.set_submodule(first, other)
        if not _same(by_input[0], _held(twin, first, held, inputs)):
            raise ValueError(f"mlp uses the weights of its first linear map ({first}) a second time. {REMEDY}")
    if output_bias:
        held = torch.randn_like(output) * torch.logspace(-2, 2, output.shape[-1]).to(output)
        if runs[-1][2].shape != output.shape or not _same(held, _held(twin, last, held, inputs)):
            raise ValueError(
                "with skip=True mlp must end in a torch.nn.Linear, whose bias absorbs the residual, but mlp changes "
                f"the output of its last one ({last}): remove what follows it."
            )
        if output.shape[-1] != inputs.shape[-1]:
            raise ValueError(
                f"with skip=True mlp's output is added to its input, but it reads {inputs.shape[-1]} features and "
                f"returns {output.shape[-1]}: give an mlp with equal widths."
            )
    return first, last


def _generic_copy(mlp: nn.Module) -> nn.Module:
    """A copy with random weights, so that no result depends on a weight that happens to be zero or one."""
    try:
        twin = copy.deepcopy(mlp).eval()
    except RuntimeError as error:  # the old weight_norm and prune hold tensors that cannot be copied
        raise ValueError(
            f"mlp cannot be copied ({error}): remove its reparametrisations first, with "
            "torch.nn.utils.remove_weight_norm or torch.nn.utils.prune.remove."
        ) from None
    for tensor in twin.parameters():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn_like(tensor) / max(1, tensor.shape[-1] if tensor.ndim else 1) ** 0.5)
    return twin


def _run_in_order(mlp: nn.Module, widths: list[int]) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]], Tensor]:
    """Run on inputs of several widths; return the inputs, each linear map with its input and output, and the output."""
    like = next(module.weight for module in mlp.modules() if isinstance(module, nn.Linear))
    refusals = []
    for width in widths:
        inputs = (torch.randn(4, width) * torch.tensor([[0.1], [1.0], [-1.0], [30.0]])).to(like)
        runs: list[tuple[str, Tensor, Tensor]] = []

        def note(name: str, runs: list = runs) -> Callable[..., None]:
            return lambda module, args, answer: runs.append((name, args[0].clone(), answer.clone()))

        hooks = [
            module.register_forward_hook(note(name))
            for name, module in mlp.named_modules()
            if isinstance(module, nn.Linear)
        ]
        try:
            output = mlp(inputs)
        except (RuntimeError, TypeError, ValueError, AssertionError, IndexError) as error:
            refusals.append(f"[4, {width}]: {error}")
            continue
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(output, Tensor):
            raise ValueError(f"mlp returns a {type(output).__name__}: it must return one tensor.")
        return inputs, runs, output
    raise ValueError(f"mlp does not run on inputs [batch, width] ({'; '.join(refusals)}). {REMEDY}")


def _held(mlp: nn.Module, name: str, answer: Tensor, inputs: Tensor) -> Tensor:
    """The output while the linear map ``name`` returns ``answer`` for every input."""
    hook = mlp.get_submodule(name).register_forward_hook(lambda *_: answer.clone())
    try:
        return mlp(inputs)
    finally:
        hook.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())


def replaced(module: nn.Module, name: str, new: nn.Module) -> Any:
    """Replace the part ``name`` of ``module`` in place and return ``module``; for an empty ``name`` return ``new``."""
    if not name:
        return new
    module.set_submodule(name, new)
    return module
