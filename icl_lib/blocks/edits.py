"""Linear maps with edited weights: one edit for all inputs, or one edit for each batch entry."""

from __future__ import annotations

from torch import Tensor, nn

from icl_lib.low_rank import LowRank
from icl_lib.validation import require_finite


class BatchedLinear(nn.Module):
    """A linear map with separate weights ``[*batch, out, in]`` for each entry of its inputs ``[*batch, in]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        batch = self.weight.shape[:-2] or self.bias.shape[:-1]
        if inputs.shape[:-1] != batch:
            raise ValueError(
                f"inputs hold {tuple(inputs.shape[:-1])} vectors, but this linear map has separate weights for "
                f"{tuple(batch)}: give inputs of the shape that the edits were made for."
            )
        outputs = (self.weight @ inputs.unsqueeze(-1)).squeeze(-1)
        return outputs if self.bias is None else outputs + self.bias


def edited_linear(old: nn.Module, weight: LowRank | None = None, bias: Tensor | None = None) -> nn.Module:
    """Return a linear map with the update added to its weights; a batched update gives a :class:`BatchedLinear`."""
    new_weight = old.weight.detach().clone() if weight is None else old.weight.detach() + weight.dense()
    new_bias = None if old.bias is None else old.bias.detach().clone()
    if bias is not None:
        new_bias = bias.clone() if new_bias is None else new_bias + bias
    for name, values in (("weight", new_weight), ("bias", new_bias)):
        if values is not None:
            require_finite(f"edited {name}", values, f"the edit overflows {values.dtype}; use a wider dtype.")
    if new_weight.ndim == 2 and (new_bias is None or new_bias.ndim == 1):
        out_features, in_features = new_weight.shape
        new = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=new_bias is not None)
        new.weight = nn.Parameter(new_weight)
        new.bias = None if new_bias is None else nn.Parameter(new_bias)
    else:
        new = BatchedLinear(new_weight, new_bias)
    return new.requires_grad_(old.weight.requires_grad).train(old.training)
