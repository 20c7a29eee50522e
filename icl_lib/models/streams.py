"""A float stream ``[*batch, n, dim]`` as the input of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.models.prompt import Prompt, accepted
from icl_lib.validation import require_finite, require_float, require_same_kind


class Stream(Prompt):
    """A prompt as a float stream; its edits have the leading dimensions ``[*batch, positions]``."""

    outer = "bias"

    @staticmethod
    def check(model: nn.Module, inputs: Any) -> None:
        """Require a stream of finite numbers, and a model that reads one."""
        if isinstance(inputs, Tensor) and "input_ids" in accepted(model):
            raise ValueError(
                f"inputs have dtype {inputs.dtype}, but {type(model).__name__} is a language model: give it token ids "
                "[*batch, n] of an integer dtype."
            )
        require_float("inputs", inputs, 2, "[*batch, n, dim]")
        require_finite("inputs", inputs, "find where the inputs become NaN or infinite.")
        own = {part.dtype: part for part in model.parameters() if part.is_floating_point()}
        if own and inputs.dtype not in own:
            require_same_kind("model", next(iter(own.values())), inputs=inputs)
        if not inputs.numel():
            raise ValueError(
                f"inputs have shape {tuple(inputs.shape)}, which holds no tokens: give [*batch, n, dim] with n of at "
                "least 2."
            )

    @staticmethod
    def lead_of(inputs: Tensor) -> torch.Size:
        """Return the leading dimensions of the inputs, ``[*batch, n]``."""
        return inputs.shape[:-1]

    def first_position(self, length: int, positions: str | None, joint: bool) -> int:
        """Return the first position that gets an edit.

        With reference ``query``, only a single query can stand for every position, each with an edit of its own.
        """
        single = self.context_length == length - 1 and not joint
        if positions == "all" and self.reference == "query" and not single:
            raise ValueError(
                f"positions is 'all' with {length - self.context_length} tokens after the context and joint={joint}, "
                "but only a single query can replace every position, with an edit for each: give "
                f"context_length={length - 1} and joint=False, reference='self' or positions='query'."
            )
        every = positions == "all" or (positions is None and (self.reference == "self" or single))
        return 0 if every else self.context_length

    def padding_of(self, inputs: Tensor, mask: Any) -> None:
        """Require that there is no mask."""
        if mask is not None:
            raise ValueError("attention_mask is for token ids: leave it out, and give streams of one length.")

    def whole(self, inputs: Tensor) -> Tensor:
        """Return the call with the context."""
        return inputs

    def bare(self, inputs: Tensor) -> Tensor:
        """Return the kept tokens and those after the context, or with reference ``self`` each token alone."""
        if self.keep:
            return inputs[..., self.places, :]
        if self.reference == "query":
            return inputs[..., self.context_length :, :]
        return inputs[..., self.first :, :].unsqueeze(-2)

    @staticmethod
    def at(call: Tensor, batch: torch.Size, positions: Tensor) -> Tensor:
        """Return the bare call of reference ``self`` for some of the positions."""
        return call[..., positions.to(call.device), :, :]

    @staticmethod
    def run(model: nn.Module, call: Tensor, keep: int | None = None) -> Tensor:
        """Run the model's own forward pass; return its outputs, or those of the last ``keep`` tokens."""
        output = model(call.clone())  # a block may change its input in place
        if not isinstance(output, Tensor):
            raise ValueError(f"the model returns a {type(output).__name__}: it must return one tensor.")
        return output if keep is None else output[..., -keep:, :]
