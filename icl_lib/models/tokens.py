"""Token ids ``[*batch, n]`` as the input of a causal language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.environment import extra
from icl_lib.models.prompt import Prompt, accepted, ids_argument


class Tokens(Prompt):
    """A prompt as token ids; the model reads it as ``[rows, n]``, its edits have ``[*batch, positions]``."""

    outer = "down"

    @staticmethod
    def check(model: nn.Module, inputs: Any) -> None:
        """Require token ids of the model's vocabulary, and a model that reads them."""
        if ids_argument(model) is None:
            raise ValueError(
                f"inputs are token ids, but the forward pass of {type(model).__name__} has no argument input_ids, and "
                "the model has no torch.nn.Embedding: give this model its float stream, or give a causal language "
                "model."
            )
        if inputs.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"inputs have dtype {inputs.dtype}: give token ids as inputs.long().")
        if inputs.is_meta or any(tensor.is_meta for tensor in model.parameters()):
            raise ValueError(
                "the model or its inputs are on the device meta, which holds no values: load the weights first, "
                "without offloading them."
            )
        if not inputs.ndim or not inputs.numel():
            raise ValueError(f"inputs have shape {tuple(inputs.shape)}: there is no token in them; give [*batch, n].")
        known = _vocabulary(model)
        wrong = (inputs < 0) | (inputs >= known)
        if bool(wrong.any()):
            where = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"inputs{where} is {inputs[tuple(where)].item()}: this model has the tokens 0 … {known - 1}. Does the "
                "tokenizer belong to another model?"
            )
        longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        if longest is not None and inputs.shape[-1] > longest:
            raise ValueError(
                f"inputs hold {inputs.shape[-1]} tokens: this model has positions for {longest}; shorten them."
            )

    def __init__(self, model: nn.Module, inputs: Tensor, *args: Any, **kwargs: Any) -> None:
        self.ids = ids_argument(model)
        config = getattr(model, "config", None)
        pad = getattr(config, "pad_token_id", None)
        # Without a padding token of its own, a model such as GPT-2 is padded with the token that ends a text.
        self.pad = pad if pad is not None else getattr(config, "eos_token_id", None)
        super().__init__(model, inputs, *args, **kwargs)

    @staticmethod
    def lead_of(inputs: Tensor) -> torch.Size:
        """Return the shape of the inputs, ``[*batch, n]``."""
        return inputs.shape

    def first_position(self, length: int, positions: str | None, joint: bool) -> int:
        """Return the first position that gets an edit: with reference ``query``, the first of the query."""
        if positions == "all" and self.reference == "query":
            raise ValueError(
                "positions='all' needs reference='self' for token ids: the edits are for runs of the whole model, in "
                "which the query cannot replace another token."
            )
        return 0 if self.reference == "self" and positions != "query" else self.context_length

    def padding_of(self, inputs: Tensor, mask: Any) -> Tensor | None:
        """Return the number of padding tokens before each prompt; without a mask, require prompts of one length."""
        if mask is None:
            _require_one_length(inputs, self.pad)
            return None
        if not isinstance(mask, Tensor) or mask.shape != inputs.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"attention_mask is {shape}: give a tensor of the shape of the inputs, {tuple(inputs.shape)}."
            )
        rows = mask.reshape(-1, self.length) != 0
        if bool((rows[:, 1:] < rows[:, :-1]).any()) or not bool(rows[:, self.first :].all()):
            raise ValueError(
                f"attention_mask hides tokens from position {self.first} on, or tokens after those that it shows: only "
                "padding before the prompt (padding_side='left'), at positions that get no edit, is covered"
                + ("; with reference='self' give positions='query'." if self.first == 0 else ".")
            )
        return self.length - rows.sum(-1)

    def whole(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the call with the context, as a user calls the model: without positions, if there is no mask."""
        ids = inputs.reshape(-1, inputs.shape[-1])
        if self.attention_mask is None:
            return {self.ids: ids}
        mask = self.attention_mask.reshape(ids.shape)
        return self._known({self.ids: ids, "position_ids": self._positions(ids, 0), "attention_mask": mask})

    def bare(self, inputs: Tensor) -> dict[str, Tensor]:
        """Return the call without the context, with every token at its own position."""
        if self.keep:
            return self._known(behind_kept(inputs.reshape(-1, inputs.shape[-1])[:, self.places], self.places))
        ids, start = (
            inputs.reshape(-1, inputs.shape[-1]),
            self.context_length if self.reference == "query" else self.first,
        )
        call = {self.ids: ids[:, start:], "position_ids": self._positions(ids, start)}
        if self.reference == "self":  # each token is a sequence of its own
            call = {name: part.reshape(-1, 1) for name, part in call.items()}
        return self._known(call)

    def _positions(self, ids: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        return positions if self.padding is None else (positions - self.padding[:, None]).clamp(min=0)

    def _known(self, call: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part for name, part in call.items() if name in self.takes}

    @staticmethod
    def at(call: dict[str, Tensor], batch: torch.Size, positions: Tensor) -> dict[str, Tensor]:
        """Return the bare call of reference ``self`` for some of the positions."""
        return {
            name: part.reshape(*batch, -1)[..., positions.to(part.device)].reshape(-1, 1) for name, part in call.items()
        }

    @staticmethod
    def run(model: nn.Module, call: dict[str, Tensor], keep: int | None = None, **options: Any) -> Tensor:
        """Return the logits ``[rows, tokens, vocabulary]``, or those of the last ``keep`` tokens."""
        output = call_model(model, call, keep, **options)
        logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 3:
            raise ValueError(
                f"the model returns a {type(output).__name__} without logits [rows, tokens, vocabulary]: give a causal "
                "language model."
            )
        wanted = next(iter(call.values())).shape[1] if keep is None else keep
        if logits.shape[1] < wanted:
            raise ValueError(
                f"the model returns the logits of {logits.shape[1]} token(s), and those of {wanted} are compared: let "
                "its forward pass return the logits of all tokens."
            )
        return logits if keep is None else logits[:, -keep:]


def behind_kept(ids: Tensor, positions: Tensor) -> dict[str, Tensor]:
    """Return the call with these ids at these positions, which may jump, as one text in each row.

    Without the mask of ones, transformers takes a jump for the beginning of another text in the same row.

    >>> behind_kept(torch.tensor([[5, 8, 9]]), torch.tensor([0, 7, 8]))["attention_mask"]
    tensor([[1, 1, 1]])
    """
    return {"input_ids": ids, "position_ids": positions.expand(ids.shape), "attention_mask": torch.ones_like(ids)}


def call_model(model: nn.Module, call: dict[str, Tensor], keep: int | None = None, **options: Any) -> Any:
    """Run the model's own forward pass, with those options that it accepts.

    A model such as nanoGPT's, ``forward(idx, targets=None)``, returns the logits of all tokens only with targets.
    """
    known = accepted(model)
    if "kwargs" in known and hasattr(getattr(model, "config", None), "use_cache"):
        known |= {"use_cache"}  # passed on to a part of the model
    options = {"use_cache": False, "targets": next(iter(call.values())), **options}
    options |= {"logits_to_keep": keep} if keep else {}
    return model(**{name: value for name, value in {**call, **options}.items() if name in known})


def _vocabulary(model: nn.Module) -> int:
    """Return the number of tokens that the model knows; without ``get_input_embeddings``, the largest that it may."""
    if hasattr(model, "get_input_embeddings"):
        return model.get_input_embeddings().num_embeddings
    return max(part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding))


def cache_name(model: nn.Module) -> str:
    """Return the name of the argument that takes the cache of keys and values."""
    return "cache" if "cache" in accepted(model) else "past_key_values"


def new_cache(model: nn.Module) -> Any:
    """Return an empty cache for a language model of transformers."""
    with extra("llm"):
        from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _require_one_length(inputs: Tensor, pad: int | None) -> None:
    """Require prompts of one length: without a mask, padding tokens would be read as context."""
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
                "give attention_mask, with the padding before the prompts (padding_side='left')."
            )
