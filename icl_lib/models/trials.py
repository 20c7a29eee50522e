r"""Run one block by itself, with the outputs of its parts held or shifted, and see what of it changes.

A block runs on its own stream, and on one that differs at all positions but the last. So whatever differs at the last
position has come from the context. :mod:`icl_lib.models.probing` tries guesses about the block in this way.

>>> block = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)).double()
>>> stream = torch.randn(1, 5, 4).double()
>>> trial = BlockTrial("blocks[0]", block, {0: stream})
>>> list(trial.maps), trial.mixes  # two linear maps, and nothing that brings context to the last position
(['0', '2'], False)
>>> trial.nudged("2")[None].round(decimals=6)  # the output follows what the last map returns, with a factor of 1
tensor([1., 1., 1., 1.], dtype=torch.float64)
>>> None in trial.nudged("0")  # but not what the first returns
False
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.models.anatomy import Anatomy, factor_at

Arguments = dict[int | str, Any]
"""The arguments of a call, by their position or their name."""


@dataclass(eq=False)
class Call:
    """One call of a part of a block: its arguments, its output, and the first tensor of each, ``[tokens, width]``."""

    given: tuple[Any, ...]
    read: Tensor | None
    output: Any = None
    wrote: Tensor | None = None


@dataclass(eq=False)
class Run:
    """One run of a block: its calls by name, in the order in which they began, and its output, ``[tokens, width]``.

    The name of a call is the path of its module; that of a second call of the same module ends in ``#1``.
    """

    calls: dict[str, Call] = field(default_factory=dict)
    output: Tensor | None = None

    def streams(self) -> dict[str | None, Tensor]:
        """Return the output, by None, and what calls read, by their names and the last first, if of the same shape."""
        read = {name: self.calls[name].read for name in reversed(self.calls)}
        return {None: self.output} | {k: v for k, v in read.items() if v is not None and v.shape == self.output.shape}


class BlockTrial:
    """A block and the arguments of its call; a block in 16 bits runs as a copy in float32, which tells more apart.

    Args:
        where: the name of the block in error messages.
        arguments: those of its call; the first tensor among them is the stream.

    Attributes:
        own: the run on its own stream.
        other: the run on a stream that differs at all positions but the last.
        maps: for each call of linear maps their places in an anatomy: those that read $z$, and the one that writes.
        mixers: the calls that bring context to the last position, such as attention.

    Raises `ValueError` for a block that does not return the same again.
    """

    def __init__(self, where: str, block: nn.Module, arguments: Arguments) -> None:
        self.where, self.block, self.arguments = where, block, arguments
        self.key, self.stream = next((key, value) for key, value in arguments.items() if has_vectors(value))
        self.tokens = next((size for size in self.stream.shape[:-1] if size > 1), 1)
        narrow = any(part.is_floating_point() and part.itemsize < 4 for part in (self.stream, *block.parameters()))
        if narrow and not self._widen():  # a kernel may be for 16 bits only
            self.block, self.arguments, self.stream = block, arguments, arguments[self.key]
        rows = self._rows(self.stream)
        self.elsewhere = torch.cat([rows[:-1].roll(1, -1), rows[-1:]]).view(self.stream.shape)
        self.own, again, self.other = (self.run(stream) for stream in (self.stream, self.stream, self.elsewhere))
        if not close(self.own.output, again.output):
            said = "keeps a state or draws at random" if self.own.output.isfinite().all() else "returns NaN or infinity"
            raise ValueError(f"{where} does not return the same when it runs again: it {said}.")
        self.maps = {name: places for name in self.own.calls if (places := self._places(name))}
        self.mixers = self.mixers_in(self.other)

    def _widen(self) -> bool:
        """Replace the block by a copy in float32; return whether that runs."""
        self.block = copy.deepcopy(self.block).float()
        self.arguments = {key: _widened(value) for key, value in self.arguments.items()}
        self.stream = self.arguments[self.key]
        try:
            self.run(self.stream)
        except (RuntimeError, ValueError):
            return False
        return True

    @torch.no_grad()
    def run(
        self, stream: Tensor, held: tuple[str, ...] = (), shifts: dict[str, Tensor] | None = None, last: bool = False
    ) -> Run:
        """Run the block.

        Args:
            held: calls that return what they did on the block's own stream; with ``last``, at the last position only.
            shifts: what is added to the outputs of calls.
        """
        run, begun, shifts = Run(), [], shifts or {}
        paths = {id(part): path for path, part in self.block.named_modules() if path}

        def before(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            path = paths[id(part)]
            again = sum(name.split("#")[0] == path for name in run.calls)
            begun.append(f"{path}#{again}" if again else path)
            given = [*args, *kwargs.values()]
            if begun[-1] in held and self.has_experts(path):  # only z is held: the gates come from the router
                given[0] = self._restored(given[0], self.own.calls[path].given[0], last)
            kept = tuple(value.clone() if isinstance(value, Tensor) else value for value in given)
            run.calls[begun[-1]] = Call(kept, self._rows(first(given)))
            return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            name = begun.pop()
            if name in held and not self.has_experts(name):
                output = self._restored(output, self.own.calls[name].output, last)
            if name in shifts:
                output = copy.deepcopy(output)
                first(output).add_(shifts[name].view(first(output).shape))
            run.calls[name].output, run.calls[name].wrote = copy.deepcopy(output), self._rows(first(output))
            return output

        named = {**self.arguments, self.key: stream.clone()}
        args = [value for key, value in named.items() if isinstance(key, int)]
        with hooked(list(self.block.modules())[1:], before, after):
            output = self.block(*args, **{key: value for key, value in named.items() if isinstance(key, str)})
        run.output = self._rows(first(output))
        return run

    def _axis(self, tensor: Tensor) -> int | None:
        """Return the dimension of the tokens, or None, as inside an attention."""
        return next((axis for axis in (0, 1) if tensor.shape[: axis + 1] == (1,) * axis + (self.tokens,)), None)

    def _rows(self, tensor: Tensor | None) -> Tensor | None:
        """Return a copy as ``[tokens, width]``."""
        if tensor is None:
            return None
        shape = (-1, tensor.shape[-1]) if self._axis(tensor) is None else (self.tokens, -1)
        return tensor.detach().reshape(shape).clone()

    def _restored(self, value: Any, was: Any, last: bool) -> Any:
        """Return a copy with the tensors of before; with ``last``, only at the last position."""
        value = copy.deepcopy(value)
        for new, old in zip(tensors(value), tensors(was), strict=True):
            if not last:
                new[...] = old
            elif (axis := self._axis(new)) is not None:
                new.select(axis, -1).copy_(old.select(axis, -1))
        return value

    def _places(self, name: str) -> tuple[tuple[str, ...], str] | None:
        """Return the places of the linear maps that a call multiplies with, or None if it does not."""
        call, module = self.own.calls[name], self.part(name)
        if f"{name.split('#')[0]}#1" in self.own.calls:  # one edit for two calls would not do
            return None
        experts = [f"{name}.{key}" for key, part in module.named_parameters(recurse=False) if part.ndim == 3]
        if len(experts) > 1 and _is_routed(*call.given[:3]):
            return tuple(experts[:-1]), experts[-1]
        weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
        if call.read is None or weight is None or weight.ndim != 2 or not weight.is_floating_point():
            return None
        read = first(call.given)
        products = [read @ matrix.to(read) for matrix in (weight.mT, weight) if len(matrix) == read.shape[-1]]
        sums = [product if bias is None else product + bias for product in products]
        written = [part for part in tensors(call.output) if has_vectors(part)]
        pairs = [(part, one.view_as(part)) for part in written for one in sums if part.numel() == one.numel()]
        return ((name,), name) if any(close(*pair) for pair in pairs) else None

    def part(self, name: str) -> nn.Module:
        """Return the module that a call is of."""
        return self.block.get_submodule(name.split("#")[0])

    def weight_shape(self, name: str) -> torch.Size:
        """Return the shape of the ``weight`` of a call's module, () if it has none."""
        weight = self.part(name)._parameters.get("weight")
        return torch.Size() if weight is None else weight.shape

    def has_experts(self, name: str) -> bool:
        """Return whether a call multiplies with the matrices of experts."""
        return self.maps[name][1] != name

    def call_of(self, place: str) -> str:
        """Return the call of a map: that of its module, also if the place is a parameter of experts."""
        return place if place in self.maps else place.rpartition(".")[0]

    def has_places(self, anatomy: Anatomy) -> bool:
        """Return whether the block has all places of the anatomy, and calls them."""
        maps = {place for inner, outer in self.maps.values() for place in (*inner, outer)}
        named, called = {*anatomy.inner, anatomy.outer}, {anatomy.stream, anatomy.scale}
        if not (named <= maps | {None} and called <= self.own.calls.keys() | {None}):
            return False
        try:
            return all(factor_at(self.block, one) is not None for one in (anatomy.multiplier, anatomy.skip_multiplier))
        except ValueError:
            return False

    @property
    def mixes(self) -> bool:
        """Return whether the last position of the output depends on the others."""
        return _differ(self.own.output[-1:], self.other.output[-1:])

    def has_context(self, name: str, run: Run, kind: str = "read", last: bool = False) -> bool:
        """Return whether a call read (with ``kind``, wrote) something else in a run, at any or at the last position."""
        old, new = (getattr(calls.get(name), kind, None) for calls in (self.own.calls, run.calls))
        if old is None or new is None or old.shape != new.shape:
            return old is not new
        return _differ(old[-1:], new[-1:]) if last else _differ(old, new)

    def mixers_in(self, run: Run) -> list[str]:
        """Return the calls that bring context to the last position in a run."""
        changed = [name for name in self.own.calls if self.has_context(name, run, "wrote", last=True)]
        return [name for name in changed if not self.has_context(name, run, last=True)]

    def readers(self) -> list[str]:
        """Return the first calls that read a tensor of the stream's shape with context; those in an attention last."""
        found: dict[str, Tensor] = {}
        for name, read in reversed(self.own.streams().items()):
            named = name is not None and "#" not in name and self.has_context(name, self.other, last=True)
            if named and not any(torch.equal(read, earlier) for earlier in found.values()):
                found[name] = read
        bare = [name for name in self.own.calls if not self.has_context(name, self.other, last=True)]

        def beside_bare(name: str) -> bool:
            parent = name.rpartition(".")[0]
            return bool(parent) and any(other.startswith(f"{parent}.") for other in bare)

        return sorted(found, key=beside_bare)

    def followers(self, run: Run, change: Tensor) -> dict[str | None, Tensor]:
        r"""Return the streams of a run that changed by $f \odot$ change, $f \ne 0$, and $f$, a vector."""
        streams = run.streams()
        pairs = [(name, old, streams[name]) for name, old in self.own.streams().items() if name in streams]
        factors = {name: _factor(new - old, change, old) for name, old, new in pairs if old.shape == change.shape}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def nudged(self, name: str, held: tuple[str, ...] = ()) -> dict[str | None, Tensor]:
        """Shift what a call writes by random vectors; return the streams that follow, as :meth:`followers` does."""
        wrote = self.own.calls[name].wrote
        noise = torch.randn(wrote.shape, generator=torch.Generator().manual_seed(0)).to(wrote)
        noise *= self.own.output.square().mean().sqrt()
        return self.followers(self.run(self.stream, held, {name: noise}), noise)


def _factor(change: Tensor, by: Tensor, size: Tensor) -> Tensor | None:
    r"""Return the vector $f$ for which change $= f \odot$ by up to rounding, or None if there is none or it is 0."""
    factor = (change * by).sum(0) / (by * by).sum(0).clamp(min=torch.finfo(size.dtype).tiny)
    rounding = 4 * torch.finfo(size.dtype).eps * size.norm()
    follows = (change - factor * by).norm() <= limit(size) * change.norm() + rounding
    return factor if follows and change.norm() > rounding else None


def _widened(value: Any) -> Any:
    """Return the floating-point tensors in an argument in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_widened, value))
    return {key: _widened(part) for key, part in value.items()} if isinstance(value, dict) else value


def _differ(old: Tensor, new: Tensor) -> bool:
    """Return whether two tensors differ by more than rounding in the last digit or two."""
    return bool((new - old).norm() > torch.finfo(old.dtype).eps ** 0.875 * old.norm())


def _is_routed(read: Any = None, chosen: Any = None, gates: Any = None) -> bool:
    """Return whether a module is called as ``experts(z, chosen, gates)``."""
    if not all(isinstance(one, Tensor) and one.ndim == 2 for one in (read, chosen, gates)):
        return False
    return gates.is_floating_point() and not chosen.is_floating_point()


@contextlib.contextmanager
def hooked(modules: Iterable[nn.Module], before: Callable[..., Any], after: Callable[..., Any]) -> Iterator[None]:
    """Inside the ``with``, modules call ``before(module, args, kwargs)`` and ``after(module, args, output)``."""
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield


def tensors(value: Any) -> Iterator[Tensor]:
    """Yield a tensor, or those of a tuple or of a dictionary."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def has_vectors(value: Any) -> bool:
    """Return whether this is a tensor of floating-point vectors."""
    return isinstance(value, Tensor) and value.ndim > 1 and value.is_floating_point()


def first(value: Any) -> Tensor | None:
    """Return the first tensor of floating-point vectors."""
    return next(filter(has_vectors, tensors(value)), None)


def limit(like: Tensor) -> float:
    """Return the relative error of a difference that may be rounding; some parts compute in float32 in any model.

    It only sorts out guesses. Whether the edits are exact is found out by running the edited model.
    """
    return max(1e-5, torch.finfo(like.dtype).eps ** 0.5)


def close(old: Tensor | None, new: Tensor | None) -> bool:
    """Return whether two tensors are equal up to rounding."""
    if old is None or new is None or old.shape != new.shape:
        return False
    return bool((old - new).norm() <= max(1e-5, 4 * torch.finfo(new.dtype).eps) * new.norm())
