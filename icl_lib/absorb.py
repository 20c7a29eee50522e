r"""Replace a context by weight edits, in every block and at every position of a model, from one pass over the prompt.

Let $c_i$ be the stream of token $i$ as it enters a block of a pre-norm transformer ($x$ for the last token, the query),
and let $A_i$ be the attention output at position $i$. The block computes

$$T(C, x)_i = h_i + W' \sigma\bigl(W\, \mathrm{LN}'(h_i) + b\bigr) + b', \qquad h_i = c_i + A_i .$$

Let $g_i = \mathrm{LN}'(h_i)$. From the query alone the attention output is $A_0$; let $h_0 = x + A_0$ and
$f = \mathrm{LN}'(h_0)$. If $f \neq 0$, then

$$\Delta W_i = \frac{W (g_i - f) f^\top}{\lVert f \rVert^2}, \qquad \Delta b'_i = h_i - h_0, \qquad
  T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x) .$$

In the blocks after the first, $x$ is the query's stream as the earlier blocks output it with the context. Source:
Innocenti and Achour, *A Simple Generalisation of the Implicit Dynamics of In-Context Learning* (arXiv 2512.11255,
version 1), Theorem 1.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.blocks.structure import require_deterministic
from icl_lib.language.absorb import absorb_tokens
from icl_lib.language.call import accepted, check_lengths, check_tokens, is_tokens
from icl_lib.models.anatomy import Anatomy, anatomy_of
from icl_lib.patch import BlockPatch, Patch, without_context
from icl_lib.theorem import bias_update, weight_update
from icl_lib.validation import require_finite, require_float, validated_by

REFERENCES = ("query", "self")


@dataclass(frozen=True, eq=False)
class Observation:
    """One block with its edits and outputs, right after it has run; made by :func:`observe`.

    Attributes:
        block: the block itself.
        fed: its input without the context: the query's stream, or each token's stream alone.
        edits: the edits that replace the context.
        output: its output with the context, ``[*batch, positions, width]``.
        output_alone: its output for ``fed``, without edits, in the same shape.
    """

    block: nn.Module
    fed: Tensor
    edits: BlockPatch
    output: Tensor
    output_alone: Tensor

    def patched(self, anatomy: Anatomy) -> Tensor:
        """Return the output of the edited block for ``fed``, ``[*batch, positions, width]``."""
        each_alone = self.fed.ndim > self.output.ndim
        with (self.edits.each_alone() if each_alone else self.edits).applied(self.block, anatomy):
            output = self.block(self.fed.clone())
        return output.squeeze(-2) if each_alone else output


class _Observer:
    """Run each block of a model a second time, without the context, right after it has run with the context."""

    def __init__(self, anatomy: Anatomy, bare: Callable[[Tensor], Tensor], first: int) -> None:
        self.anatomy, self.bare, self.first = anatomy, bare, first
        self.seen: dict[str, Tensor] = {}
        self.suffix: str | None = ""  # appended to the names in `seen`; None while nothing is recorded

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> None:
        if self.suffix != "":
            return
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
            raise ValueError(
                f"{where} is called with {len(args)} argument(s) and the keywords {sorted(kwargs)}: only blocks that "
                "are called as block(stream) are covered, since other arguments may depend on the context. Wrap the "
                "block so that it needs no others."
            )
        self.seen.clear()
        # A block may change its input in place, so a copy is kept.
        self.seen["fed"] = self.bare(args[0]).clone()

    def note(self, name: str, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if self.suffix is None:
                return
            key = name + self.suffix
            if not args or key in self.seen:
                raise ValueError(
                    f"{path} is called without a stream, or twice in one pass: name a module that is called once with "
                    "the stream (register_anatomy)."
                )
            self.seen[key] = (args[0] if self.suffix else args[0][..., self.first :, :]).clone()

        return hook

    def after(self, block: nn.Module, output: Any, where: str) -> Observation:
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{where} returns a {type(output).__name__}: only blocks that return the stream are covered. Wrap the "
                "block so that it returns this tensor and nothing else."
            )
        fed = self.seen["fed"]
        self.suffix = ", alone"
        output_alone = block(fed.clone())
        self.suffix = None
        for name, path in (("stream", self.anatomy.stream), ("read", self.anatomy.inner[0])):
            if not {name, f"{name}, alone"} <= self.seen.keys():
                raise ValueError(
                    f"{where}.{path} is never called in the block: name a module that is (register_anatomy)."
                )
        stream, read = self.seen.pop("stream"), self.seen.pop("read")
        alone = [self.seen.pop("stream, alone"), self.seen.pop("read, alone"), output_alone]
        if fed.ndim > output.ndim:  # each token was run as a sequence of its own
            alone = [tensor.squeeze(-2) for tensor in alone]
        edits = _edits(block, self.anatomy, where, stream, read, *alone[:2])
        return Observation(block, fed, edits, output[..., self.first :, :], alone[2])


def _edits(
    block: nn.Module, anatomy: Anatomy, where: str, stream: Tensor, read: Tensor, stream_alone: Tensor, alone: Tensor
) -> BlockPatch:
    """Return the edits of one block, from its streams and the MLP's inputs with and without the context."""
    inner = {}
    for path in anatomy.inner:
        try:
            inner[path] = weight_update(block.get_submodule(path).weight, alone, read)
        except ValueError as error:
            raise ValueError(f"{where}.{path}: {error} (a_without is f, the MLP's input without the context)") from None
    return BlockPatch(inner, bias_update(stream_alone, stream) if anatomy.outer else None)


def observe(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str,
    first: int,
    visit: Callable[[Observation], None],
) -> Tensor:
    """Run the model on ``inputs`` once; after each block, compute its edits and call ``visit``.

    Nothing is kept from one block to the next. Returns the model's output.

    Raises `ValueError`, with the block and the module, if the theorem does not apply or the anatomy does not fit.
    """
    anatomy = anatomy_of(model)

    bare = functools.partial(without_context, context_length=context_length, reference=reference, first=first)
    observer = _Observer(anatomy, bare, first)

    def after(block: nn.Module, _: tuple[Any, ...], output: Any, where: str) -> None:
        if observer.suffix == "":
            visit(observer.after(block, output, where))
            observer.suffix = ""

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for index, block in enumerate(model.get_submodule(anatomy.blocks)):
            where = f"{anatomy.blocks}[{index}]"
            before = functools.partial(observer.before, where=where)
            hooks.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            for name, path in (("stream", anatomy.stream), ("read", anatomy.inner[0])):
                place = block.get_submodule(path)
                hooks.callback(place.register_forward_pre_hook(observer.note(name, f"{where}.{path}")).remove)
            hooks.callback(block.register_forward_hook(functools.partial(after, where=where)).remove)
        return model(inputs)


def check_absorb(
    model: Any,
    inputs: Any,
    context_length: Any,
    reference: Any,
    positions: Any,
    outer: Any = None,
    joint: Any = False,
    progress: Any = False,
) -> None:
    """Raise `ValueError` for arguments that :func:`absorb` does not cover."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    anatomy_of(model)
    if is_tokens(inputs):
        check_tokens(model, inputs, context_length, reference, positions, outer, joint)
        return
    if "input_ids" in accepted(model) and isinstance(inputs, Tensor):
        raise ValueError(
            f"inputs have dtype {inputs.dtype}, but {type(model).__name__} is a language model: give it token ids "
            "[*batch, n] of an integer dtype."
        )
    if joint or outer not in (None, "bias"):
        raise ValueError(
            "joint=True and outer are for language models, which read token ids: leave out both for a float stream, in "
            "which each position has its own edit and the output bias takes the change."
        )
    require_float("inputs", inputs, 2, "[*batch, n, dim]")
    require_finite("inputs", inputs, "find where the inputs become NaN or infinite.")
    length = inputs.shape[-2]
    if not inputs.numel():
        raise ValueError(
            f"inputs have shape {tuple(inputs.shape)}, which holds no tokens: give [*batch, n, dim] with n of at "
            "least 2."
        )
    check_lengths(length, context_length)
    if reference not in REFERENCES:
        raise ValueError(f"reference is {reference!r}: choose 'query' or 'self'.")
    if positions not in (None, "all", "query"):
        raise ValueError(f"positions is {positions!r}: choose 'all', 'query', or None for as many as possible.")
    if positions == "all" and reference == "query" and context_length < length - 1:
        raise ValueError(
            f"positions is 'all' with {length - context_length} tokens after the context, but only a single query can "
            f"replace every position: give context_length={length - 1}, reference='self' or positions='query'."
        )
    require_deterministic(model, "model")
    if torch.is_autocast_enabled(inputs.device.type):
        raise ValueError(
            "autocast is on, so the edits would be computed in mixed precision: call this outside the autocast block."
        )


def first_position(inputs: Tensor, context_length: int, reference: str, positions: str | None) -> int:
    """Return the first position that gets an edit."""
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
    outer: str | None = None,
    joint: bool = False,
    progress: bool = False,
) -> Patch:
    r"""Compute the weight edits that replace the context of a prompt, for every block and position.

    $$\Delta W_i = \frac{W (g_i - f) f^\top}{\lVert f \rVert^2}, \qquad \Delta b'_i = h_i - h_0$$

    (Innocenti and Achour, version 1, Theorem 1; see :mod:`icl_lib.absorb` for the symbols). With ``reference="self"``,
    $f$ and $h_0$ come from token $i$ alone. The model may have any depth, skip connections or none, layer norm before
    or after its sublayers or none, and causal attention or not. The model runs over the prompt once; a language model
    then also runs once on the bare query (:mod:`icl_lib.language.passes`).

    Args:
        model: any model with an :class:`~icl_lib.models.anatomy.Anatomy`; it is not changed.
        inputs: the whole prompt, the query last: the float stream ``[*batch, n, dim]``, or the token ids
            ``[*batch, n]`` of a language model.
        context_length: how many tokens, from the first on, the patch replaces: $1 \dots n - 1$.
        reference: the input of a patched block in place of the whole stream. ``query``: the stream of the tokens after
            the context, as the earlier blocks output it with the context; a single query token then reproduces the
            outputs at *every* position, those of the context included. ``self``: each token's own stream, alone.
        positions: ``all``, or only those after the context (``query``). None means ``all`` where that is possible. With
            reference ``query`` and several query tokens, or with token ids, each query token can replace only itself.
        outer: for language models, the parameter that takes the change of the stream: the MLP's last matrix (``down``,
            the default), its bias (``bias``), or the scale of the norm behind it (``scale``). If there is such a norm,
            ``down`` turns the norm's input, and the scale stretches its output (:func:`icl_lib.output_updates.turning_update`).
        joint: for language models, one edit of each map that serves all positions, instead of one edit for each.
        progress: for language models, show a progress bar over the blocks.

    Raises `ValueError` for a model of unknown anatomy or a compiled one, for inputs that are not finite or not tokens
    of the model, for a batch with padding, for an empty context, for a context that leaves no query, and, with the
    block, for an $f$ that is zero. For a language model it raises at the first block whose output with its edits is not
    that with the prompt: a patch that does not reproduce its prompt is never returned.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=3, blocks=5, heads=3, hidden_layers=2)).double()
    >>> inputs = torch.randn(128, 51, 3).double()
    >>> patch = absorb(model, inputs, context_length=50)
    >>> patch.blocks[0].weight.shape
    torch.Size([128, 51, 12, 3])
    """
    if is_tokens(inputs):
        return absorb_tokens(model, inputs, context_length, reference, positions, outer, joint, progress)
    first = first_position(inputs, context_length, reference, positions)
    blocks: list[BlockPatch] = []
    observe(model, inputs, context_length, reference, first, lambda seen: blocks.append(seen.edits))
    return Patch(tuple(blocks), anatomy_of(model), reference, first, context_length)
