r"""A context turned into weights, in every block and at every position of a model, from one pass over the prompt.

Block $\ell$ of a pre-norm transformer, at position $i$ of the sequence $(C, x)$:

$$T(C, x)_i = h_i + W' \sigma\bigl(W\, \mathrm{LN}'(h_i) + b\bigr) + b', \qquad
  h_i = (C, x)_i + A(\mathrm{LN}(C, x))_i .$$

With $g_i = \mathrm{LN}'(h_i)$ and, from the query alone, $h_0 = x + A(\mathrm{LN}(x))$ and $f = \mathrm{LN}'(h_0)$,

$$\Delta W_i = \frac{W (g_i - f) f^\top}{\lVert f \rVert^2}, \qquad \Delta b'_i = h_i - h_0, \qquad
  T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x) .$$

Source: Innocenti and Achour, *A Simple Generalisation of the Implicit Dynamics of In-Context Learning* (arXiv
2512.11255), Theorem 1. In block $\ell$, $x$ is the query's stream as the context left it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.anatomy import Anatomy, anatomy_of
from icl_lib.edits import edited_linear
from icl_lib.low_rank import LowRank
from icl_lib.structure import replaced, require_deterministic
from icl_lib.theorem import bias_update, weight_update
from icl_lib.validation import require_finite, require_float, validated_by

REFERENCES = ("query", "self")


@dataclass(frozen=True, eq=False)
class BlockPatch:
    r"""The edits of one block, one for each position.

    Attributes:
        inner: $\Delta W_i$ of each linear map that reads what the MLP reads, by its path in the block:
            ``[*batch, positions, out, in]``, of rank one.
        outer: $\Delta b'_i$ of the bias behind the MLP, ``[*batch, positions, width]``; None for a block without a skip
            connection.
    """

    inner: dict[str, LowRank]
    outer: Tensor | None

    @property
    def weight(self) -> LowRank:
        r"""The $\Delta W_i$ of the first inner map."""
        return next(iter(self.inner.values()))

    def at(self, positions: slice) -> BlockPatch:
        """The edits at some of the positions."""
        # A factor that all positions share has one entry there; it stays shared.
        shared = {path: update.right.shape[-3] == 1 for path, update in self.inner.items()}
        inner = {
            path: LowRank(
                update.left[..., positions, :, :],
                update.right if shared[path] else update.right[..., positions, :, :],
            )
            for path, update in self.inner.items()
        }
        return BlockPatch(inner, None if self.outer is None else self.outer[..., positions, :])

    def each_alone(self) -> BlockPatch:
        """The same edits for positions that are run as sequences of one token: ``[*batch, positions, 1, …]``."""
        inner = {path: update[..., None] for path, update in self.inner.items()}
        return BlockPatch(inner, None if self.outer is None else self.outer.unsqueeze(-2))

    @contextlib.contextmanager
    def applied(self, block: nn.Module, anatomy: Anatomy) -> Iterator[None]:
        """Inside the ``with``, the block runs with these edits, kept as factors; a single query serves all positions.

        The linear maps answer $W z + L (R^\\top z)$: what a map with the weight $W + L R^\\top$ answers.
        """
        with contextlib.ExitStack() as hooks:
            for path, update in self.inner.items():
                hook = block.get_submodule(path).register_forward_hook(_adding(update))
                hooks.callback(hook.remove)
            if self.outer is not None:
                outer = self.outer
                hook = block.get_submodule(anatomy.outer).register_forward_hook(lambda _, __, answer: answer + outer)
                hooks.callback(hook.remove)
            yield


def _adding(update: LowRank) -> Callable[..., Tensor]:
    return lambda _, read, answer: update.addmv(answer, read[0])


@dataclass(frozen=True, eq=False)
class Patch:
    """What a context does to a model, as edits of its weights; made by :func:`absorb`.

    Attributes:
        blocks: the edits, block by block.
        anatomy: where in the model they belong.
        reference: what the patched blocks are fed, ``query`` or ``self``.
        first: the position in the sequence of the first edit.
        context_length: number of tokens that the patch replaces.
    """

    blocks: tuple[BlockPatch, ...]
    anatomy: Anatomy
    reference: str
    first: int
    context_length: int

    def bare(self, inputs: Tensor) -> Tensor:
        """What the patched model is fed in place of ``inputs`` ``[*batch, n, dim]``.

        Reference ``query``: the tokens after the context, ``[*batch, m, dim]``. Reference ``self``: each token as a
        sequence of its own, ``[*batch, positions, 1, dim]``.
        """
        if self.reference == "query":
            return inputs[..., self.context_length :, :]
        return inputs[..., self.first :, :].unsqueeze(-2)

    def at_query(self) -> Patch:
        """The edits at the positions after the context alone."""
        kept = tuple(block.at(slice(self.context_length - self.first, None)) for block in self.blocks)
        return Patch(kept, self.anatomy, self.reference, self.context_length, self.context_length)

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside the ``with``, ``model(patch.bare(inputs))`` answers what ``model(inputs)`` answers with the context.

        Nothing is copied, and the edits are never formed as matrices. The model is as it was afterwards, whatever
        happens inside.

        Raises `ValueError` for a model with other places or sizes, and, inside, for inputs of another shape than the
        patch was made for.

        >>> from icl_lib import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2, norm="pre")).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> patch = absorb(model, inputs, context_length=8)
        >>> with patch.applied(model):
        ...     answer = model(inputs[8:])
        >>> torch.allclose(answer, model(inputs)[8:], rtol=1e-12)
        True
        """
        running = self._as_run()
        with contextlib.ExitStack() as stack:
            for where, block, edits in self._pairs(model, running):
                shape = edits.weight.shape[:-2]
                reader = block.get_submodule(self.anatomy.inner[0])
                check = reader.register_forward_pre_hook(_requiring(shape, where))
                stack.callback(check.remove)
                stack.enter_context(edits.applied(block, self.anatomy))
            yield model

    def merged(self, model: nn.Module) -> nn.Module:
        """A copy of the model with edited weights, which answers ``patch.bare(inputs)`` by its own forward pass.

        A single edit gives ordinary linear maps; several give maps that hold one matrix for each batch entry and
        position, formed in full. Nothing hooks into the copy, and ``model`` is left as it was.

        Raises `ValueError` as :meth:`applied` does, and where an edited weight overflows.

        >>> from icl_lib import Transformer, TransformerConfig
        >>> model = Transformer(TransformerConfig(dim=4, blocks=3, heads=2)).double()
        >>> inputs = torch.randn(9, 4).double()
        >>> edited = absorb(model, inputs, context_length=8).merged(model)
        >>> torch.allclose(edited(inputs[8:]), model(inputs)[8:], rtol=1e-12)
        True
        """
        edited = copy.deepcopy(model)
        with torch.no_grad():
            for _, block, edits in self._pairs(edited, self._as_run()):
                _merge(block, edits, self.anatomy)
        return edited

    def _as_run(self) -> tuple[BlockPatch, ...]:
        """The edits that the whole network needs, in the layout of what it is fed."""
        if self.reference == "query":
            return self.at_query().blocks
        return tuple(block.each_alone() for block in self.blocks)

    def _pairs(self, model: nn.Module, patches: tuple[BlockPatch, ...]) -> Iterator[tuple[str, nn.Module, BlockPatch]]:
        if anatomy_of(model) != self.anatomy:
            raise ValueError(
                f"model keeps its parts in other places than {self.anatomy}: patch the model it came from."
            )
        blocks = list(model.get_submodule(self.anatomy.blocks))
        if len(blocks) != len(patches):
            raise ValueError(
                f"model has {len(blocks)} blocks and the patch {len(patches)}: patch the model it came from."
            )
        for index, (block, edits) in enumerate(zip(blocks, patches, strict=True)):
            where = f"{self.anatomy.blocks}[{index}]"
            for path, update in edits.inner.items():
                weight = block.get_submodule(path).weight
                if (weight.shape, weight.dtype, weight.device) != (update.shape[-2:], update.dtype, update.device):
                    raise ValueError(
                        f"{where}.{path} holds {tuple(weight.shape)}, {weight.dtype} on {weight.device} and its edit "
                        f"is {tuple(update.shape[-2:])}, {update.dtype} on {update.device}: patch the model it is from."
                    )
            yield where, block, edits


def _requiring(shape: torch.Size, where: str) -> Callable[..., None]:
    def check(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[:-1] != shape:
            raise ValueError(
                f"{where} reads {tuple(args[0].shape[:-1])} tokens and its patch was made for {tuple(shape)}: "
                "feed the patched model patch.bare(inputs)."
            )

    return check


def _merge(block: nn.Module, edits: BlockPatch, anatomy: Anatomy) -> None:
    """Replace the block's linear maps by edited ones."""
    single = edits.weight.shape[:-2].numel() == 1
    for path, update in edits.inner.items():
        update = LowRank(update.left.flatten(0, -3)[0], update.right.flatten(0, -3)[0]) if single else update
        replaced(block, path, edited_linear(block.get_submodule(path), weight=update))
    if edits.outer is not None:
        bias = edits.outer.flatten(0, -2)[0] if single else edits.outer
        replaced(block, anatomy.outer, edited_linear(block.get_submodule(anatomy.outer), bias=bias))


@dataclass(frozen=True, eq=False)
class Reading:
    """What one block reads and answers, with the context and without it; made by :func:`observe`.

    Attributes:
        index: which block.
        block: the block itself.
        fed: the stream it is fed without the context: of the query, or of each token alone.
        stream, stream_alone: the stream after attention, $h$, with the context and from ``fed``.
        read, read_alone: what the MLP reads, $z$, with the context and from ``fed``.
        output, output_alone: what the block answers, with the context and from ``fed``.
    """

    index: int
    block: nn.Module
    fed: Tensor
    stream: Tensor
    stream_alone: Tensor
    read: Tensor
    read_alone: Tensor
    output: Tensor
    output_alone: Tensor


def observe(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str,
    first: int,
    visit: Callable[[Reading], None],
) -> Tensor:
    """Run the model on ``inputs`` once; as soon as a block has run, run it without the context and call ``visit``.

    Nothing is kept from one block to the next. Returns the model's output.
    """
    anatomy = anatomy_of(model)
    seen: dict[str, Tensor] = {}
    alone = False

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: seen.update({name: args[0]})

    def after(index: int) -> Callable[..., None]:
        def run_alone(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            nonlocal alone
            if alone:
                return
            stream, read = seen["stream"], seen["read"]
            alone = True
            fed = args[0][..., context_length:, :] if reference == "query" else args[0][..., first:, :].unsqueeze(-2)
            output_alone = block(fed)
            with_context = (t[..., first:, :] for t in (stream, read, output))
            without = [seen["stream"], seen["read"], output_alone]
            if reference == "self":
                without = [t.squeeze(-2) for t in without]
            pairs = [t for pair in zip(with_context, without, strict=True) for t in pair]
            visit(Reading(index, block, fed, *pairs))
            alone = False

        return run_alone

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for index, block in enumerate(model.get_submodule(anatomy.blocks)):
            for name, path in (("stream", anatomy.stream), ("read", anatomy.inner[0])):
                hooks.callback(block.get_submodule(path).register_forward_pre_hook(note(name)).remove)
            hooks.callback(block.register_forward_hook(after(index)).remove)
        return model(inputs)


def block_patch(reading: Reading, anatomy: Anatomy) -> BlockPatch:
    """The edits of one block from what it read.

    Raises `ValueError` where the theorem does not apply, naming the block and the linear map.
    """
    inner = {}
    for path in anatomy.inner:
        weight = reading.block.get_submodule(path).weight
        try:
            inner[path] = weight_update(weight, reading.read_alone, reading.read)
        except ValueError as error:
            raise ValueError(f"{anatomy.blocks}[{reading.index}].{path}: {error}") from None
    return BlockPatch(inner, bias_update(reading.stream_alone, reading.stream) if anatomy.outer else None)


def check_absorb(model: Any, inputs: Any, context_length: Any, reference: Any, positions: Any) -> None:
    """Require arguments that :func:`absorb` can work with."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    anatomy_of(model)
    require_float("inputs", inputs, 2, "[*batch, n, dim]")
    require_finite("inputs", inputs, "look for the NaN or infinity where the inputs are made.")
    length = inputs.shape[-2]
    if isinstance(context_length, bool) or not isinstance(context_length, int):
        raise ValueError(f"context_length is {context_length!r}: give the number of tokens that the patch replaces.")
    if not 1 <= context_length < length:
        raise ValueError(
            f"context_length is {context_length} and inputs hold {length} tokens: at least one token must be replaced "
            f"and one be left to ask; give 1 … {length - 1}."
            if length > 1
            else f"inputs hold {length} token(s): a context and a query need at least two."
        )
    if reference not in REFERENCES:
        raise ValueError(f"reference is {reference!r}: choose 'query' or 'self'.")
    if positions not in (None, "all", "query"):
        raise ValueError(f"positions is {positions!r}: choose 'all' or 'query', or None for all that are possible.")
    if positions == "all" and reference == "query" and context_length < length - 1:
        raise ValueError(
            f"positions='all' with {length - context_length} tokens after the context: only a single query can stand "
            f"in for every position. Give context_length={length - 1}, reference='self' or positions='query'."
        )
    require_deterministic(model)


def first_position(inputs: Tensor, context_length: int, reference: str, positions: str | None) -> int:
    """Where the positions that get an edit begin."""
    if positions is None:
        positions = "all" if reference == "self" or context_length == inputs.shape[-2] - 1 else "query"
    return 0 if positions == "all" else context_length


@validated_by(check_absorb)
def absorb(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str = "query",
    positions: str | None = None,
) -> Patch:
    r"""Turn the context of a prompt into weight edits, for every block and position, from one pass over the prompt.

    $$\Delta W_i = \frac{W (g_i - f_i) f_i^\top}{\lVert f_i \rVert^2}, \qquad \Delta b'_i = h_i - h_{0,i}$$

    (Innocenti and Achour, Theorem 1; see :mod:`icl_lib.absorb` for the symbols). Skip connections or none, layer norm
    before or after the sublayers or none, causal or not, any depth.

    Args:
        model: any model with an :class:`~icl_lib.anatomy.Anatomy`; it is left as it was.
        inputs: the whole prompt, ``[*batch, n, dim]``, the query last.
        context_length: how many tokens, from the first on, the patch replaces: $1 \dots n - 1$.
        reference: what a patched block is fed instead of the whole stream. ``query``: the stream of the tokens after
            the context, as the context left it; a single query token reproduces *every* position, the context's
            included. ``self``: each token's own stream alone, so that $f_i$ comes from token $i$ itself.
        positions: ``all``, or only those after the context (``query``). By default all that are possible: with several
            query tokens and reference ``query``, each can only stand in for itself.

    Raises `ValueError` for a model of unknown anatomy, for inputs that are not finite, a context of no token, no token
    left to ask, and where some $f_i$ is zero, naming the block: the theorem excludes it.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=3, blocks=5, heads=3, hidden_layers=2)).double()
    >>> inputs = torch.randn(128, 51, 3).double()
    >>> patch = absorb(model, inputs, context_length=50)
    >>> patch.blocks[0].weight.shape
    torch.Size([128, 51, 12, 3])
    """
    first = first_position(inputs, context_length, reference, positions)
    anatomy = anatomy_of(model)
    blocks: list[BlockPatch] = []
    observe(
        model, inputs, context_length, reference, first, lambda reading: blocks.append(block_patch(reading, anatomy))
    )
    return Patch(tuple(blocks), anatomy, reference, first, context_length)
