"""In-context learning as exact weight updates: derive them, compute them, verify them on your own transformer."""

from icl_lib.block import ContextualBlock, ImplicitUpdate, implicit_update, kept_context
from icl_lib.contextual import GRU, LinearAttention, MeanPooling, SoftmaxAttention
from icl_lib.low_rank import LowRank
from icl_lib.theorem import bias_update, weight_update
from icl_lib.transformer import Transformer, TransformerConfig

__all__ = [
    "GRU",
    "ContextualBlock",
    "ImplicitUpdate",
    "LinearAttention",
    "LowRank",
    "MeanPooling",
    "SoftmaxAttention",
    "Transformer",
    "TransformerConfig",
    "bias_update",
    "implicit_update",
    "kept_context",
    "weight_update",
]
