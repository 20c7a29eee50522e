"""A prompt, the part of it that edits replace, and how a model is called with that part and without it.

A model reads a float stream or token ids. The two differ in :mod:`icl_lib.models.streams` and
:mod:`icl_lib.models.tokens` alone, each with a subclass of :class:`Prompt`.
"""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.blocks.structure import require_deterministic

Call = Tensor | dict[str, Tensor]


class Prompt:
    """A prompt of which the first tokens are replaced.

    A subclass checks its inputs (``check``, ``padding_of``), says which position gets the first edit
    (``first_position``), and makes the calls with the context and without it (``whole``, ``bare``, and ``at`` for some
    of the positions alone). Its ``run`` calls the model's own forward pass. ``outer`` names the weights that take the
    change of the stream by default. ``places`` are the positions of the whole prompt that get an edit: those of the
    kept tokens, whose edits change nothing, and from ``first`` on.

    Args:
        model: the model that reads the prompt.
        inputs: the whole prompt.
        context_length, reference, positions, joint, attention_mask, keep: as for
            :func:`icl_lib.models.absorb.absorb`.

    Raises `ValueError` for inputs that the theorem or the model does not cover.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Tensor,
        context_length: int,
        reference: str = "query",
        positions: str | None = None,
        joint: bool = False,
        attention_mask: Tensor | None = None,
        keep: int = 0,
    ) -> None:
        self.check(model, inputs)
        length = self.lead_of(inputs)[-1]
        check_lengths(length, context_length)
        if reference not in ("query", "self"):
            raise ValueError(f"reference is {reference!r}: choose 'query' or 'self'.")
        if positions not in (None, "all", "query"):
            raise ValueError(f"positions is {positions!r}: choose 'all', 'query', or None for as many as possible.")
        if not isinstance(joint, bool):
            raise ValueError(f"joint is {joint!r}: give True or False.")
        check_keep(keep, context_length)
        if keep and (reference != "query" or attention_mask is not None or positions == "all"):
            raise ValueError(
                f"keep is {keep}: kept tokens stay in front of the query, so give reference='query', prompts without "
                "padding (no attention_mask), and not positions='all'."
            )
        require_still(model)
        if torch.is_autocast_enabled(inputs.device.type):
            raise ValueError(
                "autocast is on, so the edits would be computed in mixed precision: call this outside the autocast "
                "block."
            )
        self.context_length, self.reference, self.length = int(context_length), reference, length
        self.keep = int(keep)
        self.first = self.first_position(length, "query" if keep else positions, joint)
        self.padding = self.padding_of(inputs, attention_mask)
        self.attention_mask = attention_mask
        self.takes = accepted(model)
        self.places = torch.tensor([*range(self.keep), *range(self.first, length)], device=inputs.device)
        self.lead = torch.Size((*self.lead_of(inputs)[:-1], len(self.places)))
        rows = self.keep + length - self.context_length if reference == "query" else length - self.first
        self.bare_lead = torch.Size((*self.lead[:-1], rows))


def tokens_in(call: Call) -> int:
    """Return the number of tokens in a call."""
    return call.shape[:-1].numel() if isinstance(call, Tensor) else next(iter(call.values())).numel()


def check_lengths(length: int, context_length: Any) -> None:
    """Require at least one token of context and one after it."""
    if isinstance(context_length, bool) or not isinstance(context_length, numbers.Integral):
        raise ValueError(f"context_length is {context_length!r}: give the number of tokens that the edits replace.")
    if not 1 <= context_length < length:
        raise ValueError(
            f"context_length is {context_length} and inputs hold {length} tokens: at least one token must be replaced "
            f"and at least one must remain; give 1 … {length - 1}."
            if length > 1
            else f"inputs hold {length} token(s): the context and the query need at least one token each; give two or "
            "more."
        )


def check_keep(keep: Any, context_length: int) -> None:
    """Require that at least one token of the context is not kept, so that there is one to replace."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Integral) or not 0 <= keep < context_length:
        raise ValueError(
            f"keep is {keep!r} and the context has {context_length} token(s): give the number of its first tokens that "
            f"stay in front of the query, 0 … {context_length - 1}."
        )


def require_still(model: nn.Module) -> None:
    """Require that the model is deterministic: no dropout and no noise, as in training."""
    require_deterministic(model, "model")
    for name, part in model.named_modules():
        for rate in ("attention_dropout", "jitter_noise", "layerdrop"):
            if part.training and isinstance(getattr(part, rate, 0), float) and getattr(part, rate) > 0:
                raise ValueError(
                    f"model.{name} has {rate}={getattr(part, rate)} in training mode, so its output differs from run "
                    "to run: call model.eval() first."
                )


def accepted(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of the model's forward pass."""
    return frozenset(inspect.signature(type(model).forward).parameters)


def ids_argument(model: nn.Module) -> str | None:
    """Return the argument of the model's forward pass that takes token ids, or None if none does.

    It is ``input_ids``. In a model without it that has an embedding, it is the first argument, such as nanoGPT's
    ``idx``.
    """
    names = [*inspect.signature(type(model).forward).parameters][1:]  # without self
    if "input_ids" in names:
        return "input_ids"
    return names[0] if names and any(isinstance(part, nn.Embedding) for part in model.modules()) else None


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Inside the ``with``, a mixture multiplies by the matrix of one expert at a time, so that each can be edited.

    This is the implementation "eager" of transformers, the only one that also runs in float64.
    """
    if not hasattr(model, "get_experts_implementation"):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
