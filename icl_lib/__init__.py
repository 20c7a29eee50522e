"""In-context learning as exact weight updates: derive them, compute them, verify them on your own transformer."""

from typing import Any

from icl_lib import pretrained
from icl_lib.blocks.block import ContextualBlock, ImplicitUpdate, implicit_update, kept_context
from icl_lib.blocks.contextual import GRU, LinearAttention, MeanPooling, SoftmaxAttention
from icl_lib.blocks.transformer import Transformer, TransformerConfig
from icl_lib.least_squares import least_squares_edit, share_served, static_update, transfer_error
from icl_lib.low_rank import LowRank
from icl_lib.measures import relative_error
from icl_lib.models.absorb import absorb
from icl_lib.models.anatomy import Anatomy, register_anatomy
from icl_lib.models.architectures import architectures
from icl_lib.models.block_patch import BlockPatch
from icl_lib.models.compiler import CompiledPatch, compile_prompt
from icl_lib.models.generation import Agreement, greedy_agreement
from icl_lib.models.patch import Patch
from icl_lib.models.probing import probe
from icl_lib.models.report import Report
from icl_lib.models.text import tokens_of
from icl_lib.models.verify import verify
from icl_lib.output_updates import output_update, scale_update, turning_update
from icl_lib.theorem import alignment, bias_update, joint_weight_update, least_norm_edit, weight_update

__version__ = "0.1.0"
__all__ = [
    "GRU",
    "Agreement",
    "Anatomy",
    "BlockPatch",
    "CompiledPatch",
    "ContextualBlock",
    "ImplicitUpdate",
    "LinearAttention",
    "LowRank",
    "MeanPooling",
    "Patch",
    "Report",
    "SoftmaxAttention",
    "Transformer",
    "TransformerConfig",
    "absorb",
    "alignment",
    "architectures",
    "bias_update",
    "compile_prompt",
    "greedy_agreement",
    "implicit_update",
    "joint_weight_update",
    "kept_context",
    "least_norm_edit",
    "least_squares_edit",
    "output_update",
    "pretrained",
    "probe",
    "register_anatomy",
    "relative_error",
    "scale_update",
    "share_served",
    "static_update",
    "tokens_of",
    "transfer_error",
    "turning_update",
    "verify",
    "weight_update",
]


def __getattr__(name: str) -> Any:
    # The widgets need the packages of the extra [widgets]: they are imported at first use, and are not in `__all__`.
    if name in ("AttentionHead", "Playground", "Puzzle", "explore"):
        from icl_lib import widgets

        return getattr(widgets, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
