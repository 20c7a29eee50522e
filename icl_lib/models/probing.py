r"""Find the anatomy of an unknown model by running it: which weights take the change that the context makes.

No name is read, only what the parts compute. The model runs once on one prompt. Then each block runs by itself: on its
own stream, and on one that differs at all positions but the last. So whatever differs at the last position has come
from the context. Hooks hold what a part returns at what it was, or shift it:

1. The list of blocks passes a stream on: each block reads what the one before it returned.
2. $h$ is the first tensor of the stream's shape with context in it that a part reads.
3. The inner maps are the linear maps that the context still reaches once those before them are held. With all of them
   held, the stream $T$ after the MLP may follow $h$ only as $s \odot h$; this gives $s$.
4. The outer map is a linear map whose shift $\delta$ shifts $T$ by $m \odot \delta$; this gives $m$. If there is none,
   it is a map read by a norm whose shift does.
5. Proof: on the stream that differs, held and shifted at the last position only, by $s \odot \Delta h / m$, the block
   must return there what it did on its own stream. An inner map that the proof does not need is left out.

In a parallel block, whose MLP reads the input of the block, nothing is held, and the output of the attention takes the
place of $h$.

>>> from icl_lib import Transformer, TransformerConfig
>>> from icl_lib.models.anatomy import known_anatomy
>>> model = Transformer(TransformerConfig(dim=4, blocks=2, norm="pre"))
>>> probe(model, torch.randn(5, 4)) == known_anatomy(model)
True
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.models.anatomy import Anatomy, Factor, factor_at

TOKENS = 12


class _Refusal(ValueError):
    """Why a guess about a block failed, and how many steps it had passed: the one that came furthest explains most."""

    def __init__(self, reason: str, steps: int = 0) -> None:
        super().__init__(reason)
        self.steps = steps


@dataclass(eq=False)
class _Call:
    """One call of a part of a block: its arguments, its output, and the first tensor of each, ``[tokens, width]``."""

    given: tuple[Any, ...]
    read: Tensor | None
    output: Any = None
    wrote: Tensor | None = None


@dataclass(eq=False)
class _Run:
    """One run of a block: its calls by name, in the order in which they began, and its output, ``[tokens, width]``."""

    calls: dict[str, _Call] = field(default_factory=dict)
    output: Tensor | None = None

    def streams(self) -> dict[str | None, Tensor]:
        """Return the output, by None, and what calls read, by their name and the last first, if of the same shape."""
        read = {name: self.calls[name].read for name in reversed(self.calls)}
        return {None: self.output} | {k: v for k, v in read.items() if v is not None and v.shape == self.output.shape}


class _Block:
    """A block and the arguments of its call. It can run again on another stream, with calls held or shifted.

    Attributes:
        own: the run on its own stream.
        other: the run on a stream that differs at all positions but the last.
        maps: for each call of linear maps their places in an anatomy: those that read $z$, and the one that writes.
        mixers: the calls that bring the context to the last position, such as attention.
    """

    def __init__(self, where: str, module: nn.Module, arguments: dict[int | str, Any], output: Tensor) -> None:
        self.where, self.module, self.arguments = where, module, arguments
        self.key, self.stream = next((key, value) for key, value in arguments.items() if _rows(value) is not None)
        rows = _rows(self.stream)
        self.elsewhere = torch.cat([rows[:-1].roll(1, -1), rows[-1:]]).view(self.stream.shape)
        self.own, self.other = self.run(self.stream), self.run(self.elsewhere)
        if not _close(self.own.output, _rows(output)):
            raise ValueError(f"{where} returns something else when it runs again: it keeps a state or draws at random.")
        self.maps = {name: places for name, call in self.own.calls.items() if (places := self._places(name, call))}
        self.mixers = [
            name for name in self.own.calls if not self.has_context(name) and self.has_context(name, "wrote")
        ]

    def run(
        self, stream: Tensor, held: tuple[str, ...] = (), shifts: dict[str, Tensor] | None = None, last: bool = False
    ) -> _Run:
        """Run the block.

        Args:
            held: calls that return what they did on the block's own stream; with ``last``, at the last position only.
            shifts: what is added to the outputs of calls.
        """
        run, begun, hooks = _Run(), [], []

        def before(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            again = sum(name.split("#")[0] == path for name in run.calls)
            name = f"{path}#{again}" if again else path
            given = [*args, *kwargs.values()]
            if name in held and self.has_experts(name):  # only z is held: the gates come from the router
                given[0] = _restored(given[0], self.own.calls[name].read, last)
            begun.append(name)
            run.calls[name] = _Call(tuple(given), _rows(_first(given)))
            return tuple(given[: len(args)]), dict(zip(kwargs, given[len(args) :], strict=True))

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            name = begun.pop()
            if name in held and not self.has_experts(name):
                output = _restored(output, self.own.calls[name].output, last)
            if shifts and name in shifts:
                _first(output).add_(shifts[name].view(_first(output).shape))
            run.calls[name].output, run.calls[name].wrote = copy.deepcopy(output), _rows(_first(output))
            return output

        try:
            for path, part in self.module.named_modules():
                if path:
                    hooks.append(part.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True))
                    hooks.append(part.register_forward_hook(after))
            named = {**self.arguments, self.key: stream.clone()}
            args = [value for key, value in named.items() if isinstance(key, int)]
            output = self.module(*args, **{key: value for key, value in named.items() if isinstance(key, str)})
        finally:
            for hook in hooks:
                hook.remove()
        run.output = _rows(_first(output))
        return run

    def _places(self, name: str, call: _Call) -> tuple[tuple[str, ...], str] | None:
        """Return the places of the linear maps that a call multiplies with, or None if it is not linear."""
        module = self.part(name)
        experts = [f"{name}.{key}" for key, part in module.named_parameters(recurse=False) if part.ndim == 3]
        if len(experts) > 1 and _is_routed(*call.given[:3]):
            return tuple(experts[:-1]), experts[-1]
        weight, bias = (module._parameters.get(key) for key in ("weight", "bias"))
        if call.read is None or weight is None or weight.ndim != 2 or not weight.is_floating_point():
            return None
        products = [call.read @ one.to(call.read) for one in (weight.mT, weight) if len(one) == call.read.shape[-1]]
        written = [rows for part in _tensors(call.output) if (rows := _rows(part)) is not None]
        pairs = [(one, product) for one in written for product in products if one.shape == product.shape]
        linear = any(_close(one, product if bias is None else product + bias) for one, product in pairs)
        return ((name,), name) if linear else None

    def part(self, name: str) -> nn.Module:
        """Return the module that a call is of."""
        return self.module.get_submodule(name.split("#")[0])

    def has_experts(self, name: str) -> bool:
        """Return whether a call multiplies with the matrices of experts."""
        return self.maps[name][1] != name

    def has_context(self, name: str, kind: str = "read", run: _Run | None = None) -> bool:
        """Return whether the context changes what a call reads, at the last position; in ``run``, at any."""
        old = getattr(self.own.calls[name], kind)
        new = getattr((run or self.other).calls.get(name), kind, None)
        if old is None or new is None or old.shape != new.shape:
            return old is not new
        rows = slice(None) if run else slice(-1, None)
        return bool((new - old)[rows].norm() > torch.finfo(old.dtype).eps ** 0.875 * old[rows].norm())

    def readers(self) -> list[str]:
        """Return the first calls that read a tensor of the stream's shape with context; none inside an attention."""
        inner = [name for name in self.mixers if not any(other.startswith(f"{name}.") for other in self.mixers)]
        found: dict[str, Tensor] = {}
        for name, read in reversed(self.own.streams().items()):
            inside = any(name and name.startswith(f"{mixer}.") for mixer in inner)
            known = any(torch.equal(read, earlier) for earlier in found.values())
            if name and self.has_context(name) and not inside and not known:
                found[name] = read
        return list(found)

    def followers(self, run: _Run, change: Tensor) -> dict[str | None, Tensor]:
        r"""Return the streams of a run that changed by $f \odot$ change, $f \ne 0$, and $f$, a vector."""
        streams = run.streams()
        pairs = [(name, old, streams[name]) for name, old in self.own.streams().items() if name in streams]
        factors = {name: _factor(new - old, change, old) for name, old, new in pairs if old.shape == change.shape}
        return {name: factor for name, factor in factors.items() if factor is not None}

    def nudged(self, name: str, held: tuple[str, ...] = ()) -> dict[str | None, Tensor]:
        """Shift what a call writes by random vectors; return the streams that follow."""
        wrote = self.own.calls[name].wrote
        noise = torch.randn(wrote.shape, generator=torch.Generator().manual_seed(0)).to(wrote)
        noise *= self.own.output.square().mean().sqrt()
        return self.followers(self.run(self.stream, held, {name: noise}), noise)


def probe(model: nn.Module, inputs: Tensor | None = None) -> Anatomy:
    """Find the anatomy of a model by running it a few times; see :mod:`icl_lib.models.probing`.

    The model is unchanged afterwards: its weights, its hooks, and the state of the random generators. The result was
    tested on one prompt, block by block; :func:`icl_lib.verify` tests the edits of the whole model.

    Args:
        model: a causal language model, or a model that reads a float stream.
        inputs: ``[*batch, n, dim]`` for a model that reads a float stream; the first of the batch is used. For a
            language model token ids ``[*batch, n]``, or None for random ones.

    Raises `ValueError` if the theorem does not cover what the model computes, or if its parts cannot be told apart. It
    names the block and what was in the way.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> probe(nn.TransformerEncoder(layer, 2).eval(), torch.randn(5, 8))
    Anatomy(blocks='layers', stream='linear1', inner=('linear1',), outer='linear2')
    """
    takes = inspect.signature(type(model).forward).parameters
    of_tokens = "input_ids" in takes
    if inputs is None and not of_tokens:
        raise ValueError(
            f"inputs is None: give {type(model).__name__} a float stream [*batch, n, dim] to be probed on."
        )
    inputs = _some_tokens(model) if inputs is None else inputs
    kept = 1 if of_tokens else 2
    one = inputs[(slice(1),) * (inputs.ndim - kept)]
    if one.shape[-kept] < 3:
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}: give 3 tokens or more, so that positions differ.")
    uncached = "use_cache" in takes or any(argument.kind is argument.VAR_KEYWORD for argument in takes.values())

    def run() -> Any:
        if not of_tokens:
            return model(one.clone())
        return model(input_ids=one.reshape(1, -1), **({"use_cache": False} if uncached else {}))

    with torch.no_grad(), torch.random.fork_rng([one.device] if one.is_cuda else []), _experts_one_by_one(model):
        return deduce(run, model)


def deduce(run: Callable[[], Any], model: nn.Module) -> Anatomy:
    """Find the anatomy of a model that ``run()`` runs on one prompt; see :func:`probe`."""
    path, blocks = _blocks(run, model)
    found: list[Anatomy | _Refusal] = []
    for block in blocks:
        known = [one for one in dict.fromkeys(found) if isinstance(one, Anatomy) and _fits(block, one)]
        try:
            found.append(next((one for one in known if _proven(block, one)), None) or _anatomy(path, block))
        except _Refusal as refusal:
            # A block that reads the keys of an earlier one gets no context from its own stream.
            found.append(known[0] if known and not block.mixers else refusal)
    for block, one in zip(blocks, found, strict=True):
        if isinstance(one, _Refusal):
            raise ValueError(f"{block.where}: {one}")
    return _chain(blocks, found)


def _blocks(run: Callable[[], Any], model: nn.Module) -> tuple[str, list[_Block]]:
    """Return the path of the list of blocks and the blocks; of several lists the one with the most parameters."""
    lists = {
        path: list(part)
        for path, part in model.named_modules()
        if path and isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part)
    }
    calls: list[tuple[nn.Module, dict[int | str, Any], Tensor]] = []
    begun: list[dict[int | str, Any]] = []
    hooks: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begun.append({key: value for key, value in (*enumerate(args), *kwargs.items())})
        begun[-1].update({key: value.clone() for key, value in begun[-1].items() if _rows(value) is not None})

    def after(module: nn.Module, _: Any, output: Any) -> None:
        calls.append((module, begun.pop(), copy.deepcopy(_first(output))))

    try:
        for module in {id(part): part for parts in lists.values() for part in parts}.values():
            hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.append(module.register_forward_hook(after))
        run()
    finally:
        for hook in hooks:
            hook.remove()

    def calls_of(path: str) -> list[tuple[nn.Module, dict[int | str, Any], Tensor]]:
        return [call for call in calls if any(call[0] is part for part in lists[path])]

    def passes_on(path: str) -> bool:
        made = calls_of(path)
        if len(made) != len(lists[path]) or any(
            call[0] is not part for call, part in zip(made, lists[path], strict=True)
        ):
            return False
        streams = [(_first(tuple(given.values())), output) for _, given, output in made]
        if any(None in pair or pair[0].shape != pair[1].shape for pair in streams):
            return False
        return all(torch.equal(one[1], following[0]) for one, following in itertools.pairwise(streams))

    passing = [path for path in lists if passes_on(path)]
    if not passing:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks: no ModuleList and no Sequential whose parts are each "
            "called once and in order, on the stream that the part before returned."
        )
    path = max(passing, key=lambda path: sum(weight.numel() for part in lists[path] for weight in part.parameters()))
    return path, [_Block(f"{path}[{i}]", *call) for i, call in enumerate(calls_of(path))]


def _anatomy(path: str, block: _Block) -> Anatomy:
    """Return the anatomy of one block: the first guess that is proven, with a skip connection if there is one."""
    refusals: list[_Refusal] = []
    without_skip = None
    if sum(size > 1 for size in block.stream.shape[:-1]) > 1:
        raise _Refusal(f"the stream has shape {tuple(block.stream.shape)}, more than one vector for each position.")
    for guess, names in ((_sequential, block.readers()), (_parallel, block.mixers)):
        for name in names:
            try:
                found = guess(path, block, name)
            except _Refusal as refusal:
                refusals.append(refusal)
                continue
            if found.outer is not None:
                return _least(block, found)
            without_skip = without_skip or found
        if guess is _sequential and without_skip is not None:
            return _least(block, without_skip)
    if not refusals:
        raise _Refusal("what it returns at the last position does not depend on the other positions.")
    raise max(refusals, key=lambda refusal: refusal.steps)


def _sequential(path: str, block: _Block, stream: str) -> Anatomy:
    """Guess that the call ``stream`` is the first to read $h$."""
    later = list(block.own.calls)[list(block.own.calls).index(stream) :]
    inner, held, run = (), (), block.other
    for name in later:
        if name in block.maps and block.has_context(name, run=run):
            if len(block.own.calls[name].read) != len(block.own.output):
                raise _Refusal(f"{name} reads a part of the tokens: experts in a list of modules are not covered.", 2)
            inner, held = (*inner, *block.maps[name][0]), (*held, name)
            run = block.run(block.elsewhere, held)
    if not inner:
        raise _Refusal(f"no linear map reads what {stream} reads, the stream after attention.")
    guess = Anatomy(path, stream, inner, None)
    if _close(run.output, block.own.output):
        return guess
    skips = block.followers(run, run.calls[stream].read - block.own.calls[stream].read)
    skips = {name: factor for name, factor in skips.items() if name is None or name in later[1:]}
    if not skips:
        raise _Refusal(
            f"the stream that {stream} reads goes on past the linear maps {', '.join(inner)}, and not only through a "
            f"skip connection: {_culprits(block, later, run)}.",
            1,
        )
    maps = [name for name in reversed(later) if name in block.maps and block.maps[name][1] not in inner]
    try:
        return _with_outer(block, guess, skips, held, maps)
    except _Refusal:
        last = next((name for name in held if name in inner and skips.keys() & block.nudged(name, held).keys()), None)
        if last is None:
            raise
    run = block.run(block.elsewhere, tuple(name for name in held if name != last))
    raise _Refusal(
        f"{last} adds to the stream, but what it reads follows the stream not only through the linear maps "
        f"{', '.join(name for name in inner if name != last)}: {_culprits(block, later, run)}.",
        3,
    )


def _parallel(path: str, block: _Block, attention: str) -> Anatomy:
    """Guess that the output of the call ``attention`` is added to the stream, and that the MLP does not read it."""
    maps = [
        name for name in reversed(block.maps) if not name.startswith(f"{attention}.") and not block.has_context(name)
    ]
    guess = Anatomy(path, attention, (), None, parallel=True)
    try:
        return _with_outer(block, guess, block.nudged(attention), (), maps)
    except _Refusal:
        raise _Refusal("no part reads the stream after attention, and no linear map beside it adds to it.") from None


def _with_outer(
    block: _Block, guess: Anatomy, skips: dict[str | None, Tensor], held: tuple[str, ...], maps: list[str]
) -> Anatomy:
    """Complete a guess by the first of these maps whose output is added to the stream, by itself or behind a norm."""
    calls, width = block.own.calls, block.own.output.shape[-1:]
    maps = sorted(maps, key=block.has_experts)  # experts last: the other maps can have a bias
    norms = [
        name for name in reversed(calls) if getattr(block.part(name)._parameters.get("weight"), "shape", 0) == width
    ]
    behind = [(norm, name) for norm in norms for name in maps if _close(calls[norm].read, calls[name].wrote)]
    unproven = False
    for norm, name in [*((None, name) for name in maps), *behind]:
        moves = block.nudged(norm or name, held)
        for target in (target for target in skips if target in moves):
            factors = {"skip_multiplier": skips[target], "multiplier": moves[target]}
            named = {field: _named(block, factor) for field, factor in factors.items()}
            found = replace(guess, outer=block.maps[name][1], scale=norm, **named)
            if _proven(block, found):
                return found
            unproven = True
    if unproven:
        raise _Refusal("what follows its MLP depends on the other positions, too.", 4)
    raise _Refusal("what its MLP adds to the stream is neither what a linear map returns nor a norm of that.", 3)


def _least(block: _Block, anatomy: Anatomy) -> Anatomy:
    """Return the anatomy without the inner maps that the proof does not need."""
    for call in reversed(block.maps):
        fewer = tuple(place for place in anatomy.inner if _call_of(block, place) != call)
        if fewer and fewer != anatomy.inner and _proven(block, replace(anatomy, inner=fewer)):
            anatomy = replace(anatomy, inner=fewer)
    return anatomy


def _proven(block: _Block, anatomy: Anatomy) -> bool:
    """Return whether the edits that the anatomy names make the block return at the last position what it did."""
    own = block.own.calls
    held = tuple(dict.fromkeys(_call_of(block, place) for place in anatomy.inner))
    shifts = {}
    if anatomy.outer is not None:
        kind = "wrote" if anatomy.parallel else "read"
        there = block.run(block.elsewhere, held, last=True).calls[anatomy.stream]
        change = getattr(own[anatomy.stream], kind) - getattr(there, kind)
        change *= factor_at(block.module, anatomy.skip_multiplier) / factor_at(block.module, anatomy.multiplier)
        change[:-1] = 0
        shifts = {anatomy.scale or _call_of(block, anatomy.outer): change}
    made = block.run(block.elsewhere, held, shifts, last=True).output[-1]
    wanted, without = block.own.output[-1], block.other.output[-1]
    rounding = 4 * torch.finfo(wanted.dtype).eps * wanted.norm()
    return bool((made - wanted).norm() <= _limit(wanted) * (without - wanted).norm() + rounding)


def _fits(block: _Block, anatomy: Anatomy) -> bool:
    """Return whether the block has all places of the anatomy."""
    tried = replace(anatomy, otherwise=anatomy)
    return tried.of(block.module) is tried


def _call_of(block: _Block, place: str) -> str:
    """Return the call of a map: that of its module, also if the place is a parameter of experts."""
    return place if place in block.maps else place.rpartition(".")[0]


def _factor(change: Tensor, by: Tensor, size: Tensor) -> Tensor | None:
    r"""Return the vector $f$ for which change $= f \odot$ by up to rounding, or None if there is none or it is 0."""
    factor = (change * by).sum(0) / (by * by).sum(0).clamp(min=torch.finfo(size.dtype).tiny)
    rounding = 4 * torch.finfo(size.dtype).eps * size.norm()
    follows = (change - factor * by).norm() <= _limit(size) * change.norm() + rounding
    return factor if follows and change.norm() > rounding else None


def _named(block: _Block, factor: Tensor) -> Factor:
    """Return a factor as the path of a number or vector in the block with this value, or as a number."""

    def same(value: float | Tensor) -> bool:
        return bool((factor - value).norm() <= _limit(factor) * factor.norm())

    if same(1.0):
        return 1.0
    for path, part in block.module.named_modules():
        values = {name: value for name, value in vars(part).items() if isinstance(value, float)}
        for name, value in {**values, **part._parameters, **part._buffers}.items():
            if isinstance(value, Tensor) and value.numel() != 1 and value.shape != factor.shape:
                continue
            if value is not None and same(value):
                return f"{path}.{name}" if path else name
    if same(factor.mean()):
        return float(factor.mean())
    raise _Refusal("the stream or what its MLP adds is multiplied by a vector that is no parameter of the block.", 4)


def _culprits(block: _Block, later: list[str], run: _Run) -> str:
    """Say which parts read what a linear map reads, with context that passes the maps that a run holds."""
    own = block.own.calls
    read = [own[name].read for name in later if name in block.maps]
    found = [
        name
        for name in later[1:]
        if name not in block.maps and not len(list(block.part(name).children())) and block.has_context(name, run=run)
    ]
    found = [name for name in found if any(_close(own[name].read, one) for one in read)]
    return (
        f"{', '.join(found)} reads it and is not a linear map" if found else "a part that is not a linear map reads it"
    )


def _chain(blocks: list[_Block], found: list[Anatomy]) -> Anatomy:
    """Return one anatomy for all blocks, with those of other kinds as ``otherwise``."""
    kinds = list(dict.fromkeys(found))
    for order in itertools.permutations(kinds):
        chain = functools.reduce(lambda rest, kind: replace(kind, otherwise=rest), reversed(order[:-1]), order[-1])
        if all(replace(chain.of(b.module), otherwise=None) == one for b, one in zip(blocks, found, strict=True)):
            return chain
    raise ValueError(
        "the blocks are of several kinds that have the same places, so no one anatomy tells them apart: "
        f"{', '.join(map(repr, kinds))}."
    )


def _is_routed(read: Any = None, chosen: Any = None, gates: Any = None) -> bool:
    """Return whether a module is called as ``experts(z, chosen, gates)``."""
    if not all(isinstance(one, Tensor) and one.ndim == 2 for one in (read, chosen, gates)):
        return False
    return gates.is_floating_point() and not chosen.is_floating_point()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield a tensor, or those of a tuple or of a dictionary."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _first(value: Any) -> Tensor | None:
    """Return the first tensor of floating-point vectors."""
    return next((part for part in _tensors(value) if _rows(part) is not None), None)


def _rows(value: Any) -> Tensor | None:
    """Return a copy of a tensor of floating-point vectors as ``[tokens, width]``, or None for anything else."""
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return None
    return value.detach().reshape(-1, value.shape[-1]).clone()


def _close(old: Tensor | None, new: Tensor | None) -> bool:
    """Return whether two tensors are equal up to rounding."""
    if old is None or new is None or old.shape != new.shape:
        return False
    return bool((old - new).norm() <= max(1e-5, 4 * torch.finfo(new.dtype).eps) * new.norm())


def _restored(value: Any, was: Any, last: bool) -> Any:
    """Return a copy with the values of before in its tensors; with ``last``, only at the last position."""
    value = copy.deepcopy(value)
    for new, old in zip(_tensors(value), _tensors(was), strict=True):
        place = (-1,) * max(1, new.ndim - 1) if last else ...
        new[place] = old[place]
    return value


def _limit(like: Tensor) -> float:
    """Return the relative error of a difference that may be rounding; some parts compute in float32 in any model."""
    return max(1e-5, torch.finfo(like.dtype).eps ** 0.5)


def _some_tokens(model: nn.Module) -> Tensor:
    """Return distinct random token ids of the model's vocabulary."""
    embedding = model.get_input_embeddings()
    ids = torch.randperm(embedding.num_embeddings, generator=torch.Generator().manual_seed(0))[:TOKENS]
    return ids.to(embedding.weight.device)


@contextlib.contextmanager
def _experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside the ``with``, a mixture of transformers runs one expert at a time, which works in every dtype."""
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
