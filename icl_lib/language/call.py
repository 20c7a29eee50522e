"""Call a language model with token ids, and check that the model and the ids are valid."""

from __future__ import annotations

import contextlib
import inspect
import numbers
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.blocks.structure import require_deterministic
from icl_lib.models.anatomy import Anatomy, anatomy_of

Call = dict[str, Tensor]


def is_tokens(inputs: Any) -> bool:
    """Return whether these inputs are token ids: a tensor of integers."""
    return isinstance(inputs, Tensor) and not (inputs.is_floating_point() or inputs.is_complex())


def full_call(ids: Tensor, length: int | None = None) -> Call:
    """Return the call for the prompt ``[*batch, n]``, or for its first ``length`` tokens."""
    ids = ids.reshape(-1, ids.shape[-1])[:, :length]
    return {"input_ids": ids, "position_ids": _positions(0, ids.shape[1], ids)}


def bare_call(ids: Tensor, context_length: int, reference: str, first: int) -> Call:
    """Return the call for the prompt without its context, every token at its own position; see `Patch.bare`.

    >>> ids = torch.tensor([[7, 8, 9]])
    >>> bare_call(ids, 1, "query", 1)
    {'input_ids': tensor([[8, 9]]), 'position_ids': tensor([[1, 2]])}
    >>> bare_call(ids, 1, "self", 1)
    {'input_ids': tensor([[8],
            [9]]), 'position_ids': tensor([[1],
            [2]])}
    """
    ids = ids.reshape(-1, ids.shape[-1])
    start = context_length if reference == "query" else first
    positions = _positions(start, ids.shape[1], ids)
    call = {"input_ids": ids[:, start:], "position_ids": positions}
    return call if reference == "query" else {name: part.reshape(-1, 1) for name, part in call.items()}


def _positions(start: int, stop: int, ids: Tensor) -> Tensor:
    return torch.arange(start, stop, device=ids.device).expand(ids.shape[0], -1)


def run(model: nn.Module, call: Call, keep: int | None = None, **options: Any) -> Tensor:
    """Return the logits ``[rows, tokens, vocabulary]``, or those of the last ``keep`` tokens."""
    output = call_model(model, call, keep, **options)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model returns a {type(output).__name__} without logits: give a causal language model.")
    return logits if keep is None else logits[:, -keep:]


def call_model(model: nn.Module, call: Call, keep: int | None = None, **options: Any) -> Any:
    """Run the model's own forward pass, with those options that it accepts."""
    known = accepted(model)
    options = {"use_cache": False, **options} | ({"logits_to_keep": keep} if keep else {})
    return model(**{name: value for name, value in {**call, **options}.items() if name in known})


def accepted(model: nn.Module) -> set[str]:
    """Return the names of the arguments of the model's forward pass."""
    return set(inspect.signature(type(model).forward).parameters)


@contextlib.contextmanager
def experts_one_by_one(model: nn.Module, anatomy: Anatomy) -> Iterator[None]:
    """Inside the ``with``, a mixture multiplies by the matrix of one expert at a time, so that each can be edited.

    This is the implementation "eager" of transformers, the only one that also runs in float64.
    """
    if not (anatomy.router and hasattr(model, "get_experts_implementation")):
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def check_tokens(
    model: Any, inputs: Any, context_length: Any, reference: Any, positions: Any, outer: Any, joint: Any
) -> None:
    """Require token ids and a language model that can be edited."""
    anatomy = anatomy_of(model)
    if "input_ids" not in accepted(model):
        raise ValueError(
            f"inputs are token ids, but the forward pass of {type(model).__name__} has no argument input_ids: give "
            "this model its float stream, or give a causal language model."
        )
    if inputs.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"inputs have dtype {inputs.dtype}: give token ids as inputs.long().")
    if inputs.is_meta or any(tensor.is_meta for tensor in model.parameters()):
        raise ValueError(
            "the model or its inputs are on the device meta, which holds no values: load the weights first, without "
            "offloading them."
        )
    if not inputs.ndim or not inputs.numel():
        raise ValueError(f"inputs have shape {tuple(inputs.shape)}: there is no token in them; give [*batch, n].")
    check_lengths(inputs.shape[-1], context_length)
    known = model.get_input_embeddings().num_embeddings
    wrong = (inputs < 0) | (inputs >= known)
    if bool(wrong.any()):
        where = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"inputs{where} is {inputs[tuple(where)].item()}: this model has the tokens 0 … {known - 1}. Does the "
            "tokenizer belong to another model?"
        )
    _require_one_length(inputs, getattr(getattr(model, "config", None), "pad_token_id", None))
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and inputs.shape[-1] > longest:
        raise ValueError(
            f"inputs hold {inputs.shape[-1]} tokens: this model has positions for {longest}; shorten them."
        )
    if reference not in ("query", "self"):
        raise ValueError(f"reference is {reference!r}: choose 'query' or 'self'.")
    if positions not in (None, "all", "query"):
        raise ValueError(f"positions is {positions!r}: choose 'all' or 'query', or None for the default.")
    if positions == "all" and reference == "query":
        raise ValueError(
            "positions='all' needs reference='self' for token ids: the edits are for runs of the whole model, in which "
            "the query cannot replace another token."
        )
    if outer is not None and outer not in anatomy.outer_choices:
        raise ValueError(
            f"outer is {outer!r}: for the blocks of {type(model).__name__} choose "
            f"{' or '.join(map(repr, anatomy.outer_choices))}."
        )
    if not isinstance(joint, bool):
        raise ValueError(f"joint is {joint!r}: give True or False.")
    require_still(model)
    if torch.is_autocast_enabled(inputs.device.type):
        raise ValueError(
            "autocast is on, so the edits would be computed in mixed precision: call this outside the autocast block."
        )


def _require_one_length(inputs: Tensor, pad: int | None) -> None:
    """Require prompts of one length: padding tokens would be read as context, since no mask is passed."""
    rows = inputs.reshape(-1, inputs.shape[-1])
    if pad is None or len(rows) < 2:
        return
    for side, ordered in (("begin", rows), ("end", rows.flip(-1))):
        padding = (ordered == pad).long().cumprod(-1).sum(-1)
        if bool((padding != padding[0]).any()):
            row = int(padding.argmax())
            raise ValueError(
                f"inputs hold prompts of different lengths: row {row} {side}s with {int(padding[row])} padding "
                f"token(s) ({pad}), another row with {int(padding.min())}. The model would read padding as context: "
                "give prompts of one length, or each prompt by itself."
            )


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


def require_still(model: nn.Module) -> None:
    """Require that the model is deterministic: no dropout and no noise, as in training."""
    require_deterministic(model, "model")
    for name, part in model.named_modules():
        for rate in ("attention_dropout", "jitter_noise"):
            if part.training and isinstance(getattr(part, rate, 0), float) and getattr(part, rate) > 0:
                raise ValueError(
                    f"model.{name} has {rate}={getattr(part, rate)} in training mode, so its output differs from run "
                    "to run: call model.eval() first."
                )
