r"""Find the anatomy of an unknown model by running it: which weights take the change that the context makes.

No name is read, only what the parts compute. The model runs once on one prompt. Then each block runs by itself: on its
own stream, and on one that differs at all positions but the last. So whatever differs at the last position has come
from the context. Hooks hold what a part returns at what it was, or shift it:

1. The list of blocks passes a stream on: each block reads what the one before it returned.
2. $h$ is the first tensor of the stream's shape with context in it that a part reads.
3. The inner maps are the linear maps that the context still reaches once those before them are held. With all of them
   held, the stream $T$ after the MLP may follow $h$ only as $s \odot h$; this gives $s$.
4. The outer map is a linear map whose shift $\delta$ shifts $T$ by $m \odot \delta$; this gives $m$. If there is none,
   it is a norm whose shift does, with the map that it reads.
5. Proof: on the stream that differs, held and shifted at the last position only, by $s \odot \Delta h / m$, the block
   must return there what it did on its own stream. An inner map that the proof does not need is left out.

In a parallel block, whose MLP reads the input of the block, nothing is held, and the output of the attention takes the
place of $h$. If all this fails, or if there is no MLP, the last linear maps of the attention are the inner maps: they
hold back all of the context, and nothing is added.

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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.models.anatomy import Anatomy, Factor, factor_at
from icl_lib.models.prompt import experts_one_by_one, ids_argument
from icl_lib.models.trials import Arguments, BlockTrial, Run, close, first, has_vectors, hooked, limit

TOKENS = 12
"""The length of the prompt on which a language model is probed."""


def probe(model: nn.Module, inputs: Tensor | None = None) -> Anatomy:
    """Find the anatomy of a model by running it a few times; see :mod:`icl_lib.models.probing`.

    The model is unchanged afterwards: its weights, its hooks, and the state of the random generators. The result was
    tested on one prompt, block by block; :func:`icl_lib.models.verify.verify` tests the edits of the whole model.

    Args:
        model: a causal language model, or a model that reads a float stream.
        inputs: ``[*batch, n, dim]`` for a model that reads a float stream. For a language model token ids
            ``[*batch, n]``, or None for random ones. Only the first of the batch is used, and of token ids only the
            first 12.

    Raises `ValueError` if the theorem does not cover what the model computes, or if its parts cannot be told apart. It
    names the block and what was in the way.

    >>> layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    >>> probe(nn.TransformerEncoder(layer, 2).eval(), torch.randn(5, 8))
    Anatomy(blocks='layers', stream='linear1', inner=('linear1',), outer='linear2')
    """
    takes = inspect.signature(type(model).forward).parameters
    ids = ids_argument(model)
    of_tokens = "input_ids" in takes or (ids is not None and inputs is not None and not inputs.is_floating_point())
    if inputs is None and not of_tokens:
        raise ValueError(
            f"inputs is None: give {type(model).__name__} a float stream [*batch, n, dim] to be probed on, or "
            "token ids [*batch, n]."
        )
    inputs = _some_tokens(model) if inputs is None else inputs
    one = inputs[(slice(1),) * (inputs.ndim - (1 if of_tokens else 2))]
    if one.shape[-1 if of_tokens else -2] < 2:
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}: give two tokens or more, one of them as context.")
    uncached = "use_cache" in takes or any(argument.kind is argument.VAR_KEYWORD for argument in takes.values())

    def run() -> Any:
        if not of_tokens:
            return model(one.clone())
        return model(**{ids: one.reshape(1, -1)[:, :TOKENS]}, **({"use_cache": False} if uncached else {}))

    with torch.no_grad(), torch.random.fork_rng([one.device] if one.is_cuda else []), experts_one_by_one(model):
        return deduce(run, model)


def deduce(run: Callable[[], Any], model: nn.Module) -> Anatomy:
    """Find the anatomy of a model that ``run()`` runs on one prompt; see :func:`probe`."""
    path, calls = _calls(run, model)
    trials = functools.partial(itertools.starmap, BlockTrial, calls)  # one at a time, since a trial may hold a copy
    found: list[Anatomy] = []
    mixes = False
    for block in trials():
        known = (one for one in dict.fromkeys(found) if block.has_places(one) and _is_proven(block, one))
        try:
            found.append(next(known, None) or _anatomy(path, block))
        except _Refusal as refusal:
            raise ValueError(f"{block.where}: {refusal}") from None
        mixes |= block.mixes
    if not mixes:
        raise ValueError(f"{path}: what the blocks return at the last position does not depend on the other positions.")
    modules = [module for _, module, _ in calls]
    chain = _chain(modules, found)
    if chain is None:
        with contextlib.suppress(_Refusal):
            chain = _chain(modules, [_least(block, _mixing(path, block)) for block in trials()])
    if chain is None:
        kinds = ", ".join(map(repr, dict.fromkeys(found)))
        raise ValueError(f"{path}: blocks with the same places need different anatomies: {kinds}.")
    return chain


class _Refusal(ValueError):
    """Why a guess about a block failed, and how many steps it had passed: the one that came furthest explains most."""

    def __init__(self, reason: str, steps: int = 0) -> None:
        super().__init__(reason)
        self.steps = steps


def _calls(run: Callable[[], Any], model: nn.Module) -> tuple[str, list[tuple[str, nn.Module, Arguments]]]:
    """Return the path of the list of blocks, and for each its name, itself and the arguments of its call.

    Of several lists it is the one with the most parameters.
    """
    kinds = (nn.ModuleList, nn.Sequential)
    lists = {path: list(part) for path, part in model.named_modules() if path and isinstance(part, kinds) and len(part)}
    calls: list[tuple[nn.Module, Arguments, Tensor | None]] = []
    begun: list[Arguments] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(enumerate(args)), **kwargs}
        begun.append({key: value.clone() if has_vectors(value) else value for key, value in given.items()})

    def after(module: nn.Module, _: Any, output: Any) -> None:
        calls.append((module, begun.pop(), copy.deepcopy(first(output))))

    with hooked({id(part): part for parts in lists.values() for part in parts}.values(), before, after):
        run()
    made = {path: [call for call in calls if any(call[0] is part for part in parts)] for path, parts in lists.items()}
    passing = [path for path, parts in lists.items() if [id(call[0]) for call in made[path]] == [*map(id, parts)]]
    passing = [path for path in passing if _pass_on([(first(list(call[1].values())), call[2]) for call in made[path]])]
    if not passing:
        raise ValueError(
            f"{type(model).__name__} has no list of blocks: no ModuleList and no Sequential whose parts are each "
            "called once and in order, on the stream that the part before returned."
        )
    path = max(passing, key=lambda path: sum(weight.numel() for part in lists[path] for weight in part.parameters()))
    return path, [(f"{path}[{i}]", part, given) for i, (part, given, _) in enumerate(made[path])]


def _pass_on(streams: list[tuple[Tensor | None, Tensor | None]]) -> bool:
    """Return whether parts that read and returned these streams pass one stream on."""
    if any(read is None or wrote is None or read.shape != wrote.shape for read, wrote in streams):
        return False
    return all(torch.equal(wrote, read) for (_, wrote), (read, _) in itertools.pairwise(streams))


def _anatomy(path: str, block: BlockTrial) -> Anatomy:
    """Return the anatomy of one block: the first guess that is proven, with a skip connection if there is one."""
    if not block.mixes:
        return _alone(path, block)
    refusals: list[_Refusal] = []
    for guesses in (
        [functools.partial(_sequential, path, block, name) for name in block.readers()],
        [functools.partial(_parallel, path, block, name) for name in block.mixers],
        [functools.partial(_mixing, path, block)],
    ):
        proven = []
        for guess in guesses:
            try:
                proven.append(_least(block, guess()))
            except _Refusal as refusal:
                refusals.append(refusal)
        if proven:
            return next((one for one in proven if one.outer or one.scale), proven[0])
    raise max(refusals, key=lambda refusal: refusal.steps)


def _sequential(path: str, block: BlockTrial, stream: str) -> Anatomy:
    """Guess that the call ``stream`` is the first to read $h$."""
    names = list(block.own.calls)
    later = names[names.index(stream) :]
    inner, held, run = (), (), block.other
    for name in later:
        if name in block.maps and block.has_context(name, run):
            lengths = [len(one.calls[name].read) for one in (block.own, run) if name in one.calls]
            if lengths != [block.tokens] * 2:
                raise _Refusal(f"{name} reads a part of the tokens: experts in a list of modules are not covered.", 2)
            inner, held = (*inner, *block.maps[name][0]), (*held, name)
            run = block.run(block.elsewhere, held)
    if not inner:
        raise _Refusal(f"no linear map reads what {stream} reads, the stream after attention.")
    guess = Anatomy(path, stream, inner, None)
    if close(run.output, block.own.output) and _is_proven(block, guess):
        return guess
    own, h = block.own.streams(), block.own.calls[stream].read
    skips = block.followers(run, run.calls[stream].read - h)
    skips = {name: s for name, s in skips.items() if name in {None, *later} and not torch.equal(own[name], h)}
    if not skips:
        raise _Refusal(
            f"the stream that {stream} reads goes on past {', '.join(inner)}, and not only through a skip connection: "
            f"{_culprits(block, later, run)}.",
            1,
        )
    try:
        return _with_outer(block, guess, skips, held, later)
    except _Refusal:
        last = next((name for name in held if name in inner and skips.keys() & block.nudged(name, held).keys()), None)
        if last is None:
            raise
    run = block.run(block.elsewhere, tuple(name for name in held if name != last))
    raise _Refusal(
        f"{last} adds to the stream, but what it reads follows the stream not only through "
        f"{', '.join(name for name in inner if name != last) or 'linear maps'}: {_culprits(block, later, run)}.",
        3,
    )


def _parallel(path: str, block: BlockTrial, attention: str) -> Anatomy:
    """Guess that the output of the call ``attention`` is added to the stream, and that the MLP does not read it."""
    bare = [name for name in block.own.calls if not block.has_context(name, block.other, last=True)]
    parts = [name for name in bare if name not in block.mixers and not name.startswith(f"{attention}.")]
    try:
        return _with_outer(block, Anatomy(path, attention, (), None, parallel=True), block.nudged(attention), (), parts)
    except _Refusal:
        raise _Refusal("no part reads the stream after attention, and no linear map beside it adds to it.") from None


def _mixing(path: str, block: BlockTrial) -> Anatomy:
    """Guess that the last maps of all parts that mix positions are the inner maps."""
    held: tuple[str, ...] = ()
    while True:
        mixers = block.mixers_in(block.run(block.elsewhere, held, last=True))
        free = [name for name in block.maps if name not in held]
        inside = [[name for name in free if name.startswith(f"{mixer}.")] for mixer in mixers]
        if not any(inside):
            shape = tuple(block.stream.shape)
            raise _Refusal(f"no part of it that ends in a linear map mixes the positions of its stream {shape}.")
        held = (*held, next(filter(None, inside))[-1])
        guess = Anatomy(path, block.mixers[0], tuple(place for name in held for place in block.maps[name][0]), None)
        if _is_proven(block, guess):
            return guess


def _alone(path: str, block: BlockTrial) -> Anatomy:
    """Return an anatomy for a block that mixes no positions: it needs no edit, so any map will do."""
    plain = [name for name in block.maps if not block.has_experts(name)]
    if not plain:
        raise _Refusal("no part of it is a linear map.")
    return Anatomy(path, plain[-1], (plain[-1],), None)


def _with_outer(
    block: BlockTrial, guess: Anatomy, skips: dict[str | None, Tensor], held: tuple[str, ...], parts: list[str]
) -> Anatomy:
    """Complete a guess by the first map among these parts whose output is added to the stream, or the first norm."""
    calls, width = block.own.calls, block.own.output.shape[-1:]
    norms = [name for name in parts if block.weight_shape(name) == width and "#" not in name]
    maps = [name for name in parts if name in block.maps and block.maps[name][1] not in guess.inner]
    plain = [name for name in maps if not block.has_experts(name)]
    read = {norm: next((name for name in plain if close(calls[name].wrote, calls[norm].read)), None) for norm in norms}
    unproven = False
    # Experts after the other maps, which can have a bias. A norm of more than the output of one map stands alone.
    for name, norm in [*((name, None) for name in sorted(maps, key=block.has_experts)), *((read[n], n) for n in norms)]:
        moved = block.nudged(norm or name, held)
        for target in (target for target in skips if target in moved):
            factors = {"skip_multiplier": skips[target], "multiplier": moved[target]}
            named = {field: _named(block, factor) for field, factor in factors.items()}
            found = replace(guess, outer=name and block.maps[name][1], scale=norm, **named)
            if _is_proven(block, found):
                return found
            unproven = True
    if unproven:
        raise _Refusal("what follows its MLP depends on the other positions, too.", 3)
    raise _Refusal("what its MLP adds to the stream is neither what a linear map returns nor a norm of that.", 3)


def _least(block: BlockTrial, anatomy: Anatomy) -> Anatomy:
    """Return the anatomy without the inner maps that the proof does not need."""
    own, other = block.own.output[-1], block.other.output[-1]
    rounding = 1e-5 * float((other - own).norm()) + torch.finfo(own.dtype).eps * float(own.norm())
    for call in reversed(block.maps):
        fewer = tuple(place for place in anatomy.inner if block.call_of(place) != call)
        if fewer and fewer != anatomy.inner:
            less = replace(anatomy, inner=fewer)
            anatomy = less if _error(block, less) <= _error(block, anatomy) + rounding else anatomy
    return anatomy


def _is_proven(block: BlockTrial, anatomy: Anatomy) -> bool:
    """Return whether the edits that the anatomy names make the block return at the last position what it did."""
    own, other = block.own.output[-1], block.other.output[-1]
    rounding = 2 * torch.finfo(own.dtype).eps * float(own.norm())
    return _error(block, anatomy) <= limit(own) * float((other - own).norm()) + rounding


def _error(block: BlockTrial, anatomy: Anatomy) -> float:
    """Return how far from what it was the block's output at the last position is, with the anatomy's edits."""
    held, shifts = tuple(dict.fromkeys(map(block.call_of, anatomy.inner))), {}
    if anatomy.outer or anatomy.scale:
        kind = "wrote" if anatomy.parallel else "read"
        there = block.run(block.elsewhere, held, last=True)
        change = getattr(block.own.calls[anatomy.stream], kind) - getattr(there.calls[anatomy.stream], kind)
        change *= factor_at(block.block, anatomy.skip_multiplier) / factor_at(block.block, anatomy.multiplier)
        change[:-1] = 0
        shifts = {anatomy.scale or block.call_of(anatomy.outer): change}
    made = block.run(block.elsewhere, held, shifts, last=True).output[-1]
    return float((made - block.own.output[-1]).norm())


def _named(block: BlockTrial, factor: Tensor) -> Factor:
    """Return a factor as the path of a number or vector in the block with this value, or as a number."""

    def same(value: float | Tensor) -> bool:
        return bool((factor - value).norm() <= limit(factor) * factor.norm())

    if same(1.0):
        return 1.0
    for path, part in block.block.named_modules():
        numbers = {name: value for name, value in vars(part).items() if isinstance(value, float)}
        tensors = {**part._parameters, **part._buffers}
        fitting = {k: v for k, v in tensors.items() if v is not None and (v.numel() == 1 or v.shape == factor.shape)}
        for name, value in {**numbers, **fitting}.items():
            if same(value):
                return f"{path}.{name}" if path else name
    if same(factor.mean()):
        return float(factor.mean())
    raise _Refusal("the stream or what its MLP adds is multiplied by a vector that is no parameter of the block.", 3)


def _culprits(block: BlockTrial, later: list[str], run: Run) -> str:
    """Say which parts read what a linear map reads, with context that passes the maps that a run holds."""
    own = block.own.calls
    twice = [name for name in later if f"{name}#1" in later and len(block.weight_shape(name)) == 2]
    if twice:
        return f"{', '.join(twice)} is called twice, and one edit would not do for both calls"
    read = [own[name].read for name in later if name in block.maps]
    leaves = [name for name in later[1:] if name not in block.maps and not any(block.part(name).children())]
    leaves = [name for name in leaves if any(close(own[name].read, one) for one in read)]
    found = ", ".join(name for name in leaves if block.has_context(name, run))
    return f"{found or 'a function in its forward pass'} reads it and is not a linear map"


def _chain(blocks: list[nn.Module], found: list[Anatomy]) -> Anatomy | None:
    """Return one anatomy for all blocks, with those of other kinds as ``otherwise``, or None if there is none."""
    for order in itertools.permutations(dict.fromkeys(found)):
        chain = functools.reduce(lambda rest, kind: replace(kind, otherwise=rest), reversed(order[:-1]), order[-1])
        if all(replace(chain.of(block), otherwise=None) == one for block, one in zip(blocks, found, strict=True)):
            return chain
    return None


def _some_tokens(model: nn.Module) -> Tensor:
    """Return distinct random token ids of the model's vocabulary."""
    embedding = model.get_input_embeddings()
    ids = torch.randperm(embedding.num_embeddings, generator=torch.Generator().manual_seed(0))[:TOKENS]
    return ids.to(embedding.weight.device)
