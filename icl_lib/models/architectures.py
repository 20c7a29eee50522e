r"""The anatomies of language models of Hugging Face, one entry for each ``model_type``.

- Sequential blocks (GPT-2, Llama, Qwen 3, BERT, ...): the inner maps are edited, then the last map or its bias.
- Blocks with a norm after the MLP (Gemma 3, OLMo 2, ...): the inner maps, then the last map and the norm's scale, or
  the scale alone.
- Parallel blocks (Pythia, GPT-J, Phi, Falcon, Cohere, ...): only the last map or its bias, since the MLP reads the
  input of the block, which is the same with and without the context once the earlier blocks are edited.
- Experts (Mixtral, DeepSeek, ...): the router and the inner maps of each active expert and of the shared expert, then
  the last map of the shared expert, which every token passes, or else of each active expert.
- Blocks that only mix tokens (Mamba, ...): the last map of the mixer. It reads all that depends on the context, so it
  is the inner map, and nothing else has to change.

:func:`architectures` lists them. A model with blocks like one of these needs one more line:

>>> from icl_lib.models.anatomy import ARCHITECTURES
>>> ARCHITECTURES["my_llama"] = LLAMA
>>> del ARCHITECTURES["my_llama"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from tabulate import tabulate

from icl_lib.models.anatomy import ARCHITECTURES, Anatomy

# The norm before the MLP reads the stream. The variants have other names, or one inner map instead of two.
LLAMA = Anatomy(
    blocks="model.layers",
    stream="post_attention_layernorm",
    inner=("mlp.gate_proj", "mlp.up_proj"),
    outer="mlp.down_proj",
)
PHI_3 = replace(LLAMA, inner=("mlp.gate_up_proj",))
NEMOTRON = replace(LLAMA, inner=("mlp.up_proj",))
GPT_2 = Anatomy(blocks="transformer.h", stream="ln_2", inner=("mlp.c_fc",), outer="mlp.c_proj")
GPT_NEOX = Anatomy("gpt_neox.layers", "post_attention_layernorm", ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")
OPT = Anatomy("model.decoder.layers", "final_layer_norm", ("fc1",), "fc2")
BAMBA = Anatomy(
    blocks="model.layers",
    stream="pre_ff_layernorm",
    inner=("feed_forward.gate_proj", "feed_forward.up_proj"),
    outer="feed_forward.down_proj",
)
LFM_2 = Anatomy("model.layers", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
RECURRENT_GEMMA = Anatomy(
    blocks="model.layers",
    stream="channel_pre_norm",
    inner=("mlp_block.gate_proj", "mlp_block.up_proj"),
    outer="mlp_block.down_proj",
)
XLSTM = Anatomy("backbone.blocks", "norm_ffn", ("ffn.proj_up_gate", "ffn.proj_up"), "ffn.proj_down")

# Norms behind the sublayers, on the stream itself: the MLP reads the stream.
BERT = Anatomy("bert.encoder.layer", "intermediate", ("intermediate.dense",), "output.dense")
ROBERTA = replace(BERT, blocks="roberta.encoder.layer")

# A norm between the MLP and the stream. In OLMo 2 it is the only one, so the MLP reads the stream itself.
GEMMA_3 = replace(LLAMA, stream="pre_feedforward_layernorm", scale="post_feedforward_layernorm")
OLMO_2 = replace(LLAMA, stream="mlp", scale="post_feedforward_layernorm")

# Attention and MLP side by side.
GPT_J = Anatomy(blocks="transformer.h", stream="attn", inner=(), outer="mlp.fc_out", parallel=True)
PHI = Anatomy(blocks="model.layers", stream="self_attn", inner=(), outer="mlp.fc2", parallel=True)
COHERE = replace(PHI, outer="mlp.down_proj")

# Experts. Some models have dense blocks in between.
MIXTRAL = replace(LLAMA, inner=("mlp.gate", "mlp.experts.gate_up_proj"), outer="mlp.experts.down_proj")
QWEN_3_MOE = replace(MIXTRAL, otherwise=LLAMA)
PHI_MOE = replace(MIXTRAL, inner=("mlp.router", "mlp.experts.gate_up_proj"))
JAMBA = replace(
    BAMBA,
    inner=("feed_forward.router", "feed_forward.experts.gate_up_proj"),
    outer="feed_forward.experts.down_proj",
    otherwise=BAMBA,
)
GRANITE_MOE = replace(
    LLAMA,
    inner=("block_sparse_moe.router", "block_sparse_moe.experts.gate_up_proj"),
    outer="block_sparse_moe.experts.down_proj",
    multiplier="residual_multiplier",
)

LFM_2_MOE = replace(
    LFM_2,
    inner=("feed_forward.gate", "feed_forward.experts.gate_up_proj"),
    outer="feed_forward.experts.down_proj",
    otherwise=LFM_2,
)
# The experts stand beside the MLP, each with a norm before and behind it.
GEMMA_4 = replace(
    GEMMA_3,
    inner=(*GEMMA_3.inner, "router.proj", "experts.gate_up_proj"),
    otherwise=GEMMA_3,
)

# Experts beside one that every token passes.
DEEPSEEK = replace(
    LLAMA,
    inner=(*MIXTRAL.inner, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    outer="mlp.shared_experts.down_proj",
    otherwise=QWEN_3_MOE,
)
FLINT = replace(
    LLAMA,
    inner=(*MIXTRAL.inner, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    outer="mlp.shared_expert.down_proj",
    otherwise=LLAMA,
)
GRANITE_MOE_SHARED = replace(
    GRANITE_MOE,
    inner=(*GRANITE_MOE.inner, "shared_mlp.input_linear"),
    outer="shared_mlp.output_linear",
    otherwise=GRANITE_MOE,
)
# A gate weighs the shared expert, so the others take the change.
QWEN_2_MOE = replace(
    FLINT, inner=(*FLINT.inner, "mlp.shared_expert_gate"), outer="mlp.experts.down_proj"
)

# No MLP: the last map of the mixer.
MAMBA = Anatomy("backbone.layers", "norm", ("mixer.out_proj",), None)
# Blocks of a single sublayer. An MLP or experts read the stream alone, which is the same with and without the context.
_ALONE = [replace(MAMBA, blocks="model.layers", inner=(f"mixer.{path}",)) for path in ("down_proj", "gate")]
NEMOTRON_H = replace(
    MAMBA,
    blocks="model.layers",
    otherwise=replace(MAMBA, blocks="model.layers", inner=("mixer.o_proj",), otherwise=replace(_ALONE[0], otherwise=_ALONE[1])),
)
ZAMBA_2 = Anatomy(
    blocks="model.layers",
    stream="mamba.out_proj",
    inner=("mamba.out_proj",),
    outer=None,
    otherwise=Anatomy("model.layers", "mamba_decoder.mamba", ("mamba_decoder.mamba.out_proj",), None),
)
# Between the stream after attention and the end of the block stands something else, such as several streams: the last map of
# the attention.
ATTENTION = Anatomy("model.layers", "self_attn", ("self_attn.o_proj",), None)


def _opt(model: Any) -> Anatomy:
    """The MLP reads the stream itself if the norms follow the sublayers."""
    return OPT if model.config.do_layer_norm_before else replace(OPT, stream="fc1")


def _bloom(model: Any) -> Anatomy:
    """The norm belongs to the stream if the configuration says so."""
    bloom = replace(GPT_NEOX, blocks="transformer.h")
    return replace(bloom, stream="mlp") if model.config.apply_residual_connection_post_layernorm else bloom


def _gpt_neox(model: Any) -> Anatomy:
    """Parallel or sequential blocks."""
    parallel = replace(GPT_NEOX, stream="attention", inner=(), parallel=True)
    return parallel if model.config.use_parallel_residual else GPT_NEOX


def _falcon(model: Any) -> Anatomy:
    """Parallel or sequential blocks."""
    falcon = replace(GPT_NEOX, blocks="transformer.h")
    parallel = model.config.new_decoder_architecture or model.config.parallel_attn
    return replace(falcon, stream="self_attention", inner=(), parallel=True) if parallel else falcon


def _stablelm(model: Any) -> Anatomy:
    """Parallel or sequential blocks."""
    return COHERE if model.config.use_parallel_residual else LLAMA


_KINDS: dict[str, Anatomy | Callable[[Any], Anatomy]] = {
    # Like Llama, whatever the attention is.
    "llama bitnet cwm diffllama ernie4_5 exaone gemma helium hunyuan_v1_dense internlm3 iquestcoder ministral": LLAMA,
    "ministral3 mistral olmo qwen2 qwen3 qwen3_5_text seed_oss smollm3 youtu": LLAMA,
    "vaultgemma": replace(LLAMA, stream="pre_feedforward_layernorm"),
    "bamba": BAMBA,
    "lfm2": LFM_2,
    "recurrent_gemma": RECURRENT_GEMMA,
    "xlstm": XLSTM,
    # One inner map.
    "glm phi3": PHI_3,
    "arcee jais2 nemotron": NEMOTRON,
    "apertus apertus1p5_text": replace(NEMOTRON, stream="feedforward_layernorm"),
    "nanochat": replace(LLAMA, inner=("mlp.fc1",), outer="mlp.fc2"),
    "modernbert-decoder": Anatomy("model.layers", "mlp_norm", ("mlp.Wi",), "mlp.Wo"),
    "gpt2 gpt_bigcode gpt_neo": GPT_2,
    "starcoder2": replace(GPT_2, blocks="model.layers", stream="post_attention_layernorm"),
    "persimmon": replace(GPT_NEOX, blocks="model.layers"),
    "gpt_neox_japanese": replace(GPT_NEOX, blocks="gpt_neox_japanese.layers"),
    "bloom": _bloom,
    "mpt": Anatomy("transformer.blocks", "norm_2", ("ffn.up_proj",), "ffn.down_proj"),
    "ctrl": Anatomy("transformer.h", "layernorm2", ("ffn.0",), "ffn.2"),
    "opt": _opt,
    "xglm": replace(OPT, blocks="model.layers"),
    "biogpt": replace(OPT, blocks="biogpt.layers"),
    "megatron-bert": replace(BERT, stream="ln"),
    "xlm-roberta-xl": replace(ROBERTA, stream="LayerNorm"),
    # Norms behind the sublayers.
    "openai-gpt": replace(GPT_2, stream="mlp"),
    "bert bert-generation big_bird": BERT,
    "camembert roberta xlm-roberta xmod": ROBERTA,
    "roformer": replace(BERT, blocks="roformer.encoder.layer"),
    "data2vec-text": replace(BERT, blocks="data2vec_text.encoder.layer"),
    "electra": replace(BERT, blocks="electra.encoder.layer"),
    "ernie": replace(BERT, blocks="ernie.encoder.layer"),
    "rembert": replace(BERT, blocks="rembert.encoder.layer"),
    "roberta-prelayernorm": replace(BERT, blocks="roberta_prelayernorm.encoder.layer"),
    "roc_bert": replace(BERT, blocks="roc_bert.encoder.layer"),
    # Factors on the stream or on the output of the MLP.
    "granite granite_swa": replace(LLAMA, multiplier="residual_multiplier"),
    "minicpm3": replace(LLAMA, multiplier="residual_scale"),
    "falcon_h1": replace(BAMBA, multiplier="feed_forward.down_multiplier"),
    "doge": replace(LLAMA, skip_multiplier="post_attention_residual"),
    # A norm between the MLP and the stream.
    "gemma2 gemma3_text gemma4_unified_text": GEMMA_3,
    "gemma3": replace(GEMMA_3, blocks="model.language_model.layers"),
    "olmo2 olmo3 exaone4": OLMO_2,
    "olmo_hybrid": replace(OLMO_2, otherwise=LLAMA),
    "glm4": replace(PHI_3, scale="post_mlp_layernorm"),
    "lfm3": replace(LFM_2, scale="post_ffn_norm"),
    "hyperclovax": replace(LLAMA, scale="post_norm2", multiplier="residual_multiplier"),
    # Parallel.
    "gptj codegen": GPT_J,
    "phi": PHI,
    "cohere cohere2 cohere_compass_text": COHERE,
    "cohere2_moe": replace(COHERE, outer="mlp.experts.down_proj", otherwise=COHERE),
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "stablelm": _stablelm,
    # Experts.
    "mixtral minimax_m2 olmoe": MIXTRAL,
    "qwen3_moe mellum mimo_v2_flash": QWEN_3_MOE,
    "minimax": replace(MIXTRAL, stream="mlp", multiplier="mlp_beta_factor", skip_multiplier="mlp_alpha_factor"),
    "phimoe gpt_oss": PHI_MOE,
    "jamba": JAMBA,
    "lfm2_moe": LFM_2_MOE,
    "granitemoe": GRANITE_MOE,
    "flex_olmo": replace(MIXTRAL, stream="mlp", scale="post_feedforward_layernorm"),
    "gemma4_text": GEMMA_4,
    # Experts beside one that every token passes.
    "deepseek_v2 deepseek_v3 deepseek_v32 axk2 bailing_hybrid dots1 dots3_note_text ernie4_5_moe exaone_moe": DEEPSEEK,
    "glm4_moe glm4_moe_lite glm_moe_dsa hy_v3 kimi_linear laguna sarvam_mla sarvam_moe solar_open": DEEPSEEK,
    "minimax_m3_vl_text": replace(
        DEEPSEEK, inner=(*MIXTRAL.inner, "mlp.shared_experts.gate_up_proj"), otherwise=PHI_3
    ),
    "aria_text": replace(DEEPSEEK, inner=("mlp.router", *DEEPSEEK.inner[1:])),
    "hunyuan_v1_moe": replace(
        MIXTRAL,
        inner=("mlp.gate.wg", MIXTRAL.inner[1], "mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
        outer="mlp.shared_mlp.down_proj",
    ),
    "flint lara_mini": FLINT,
    "qwen2_moe qwen3_next qwen3_5_moe_text": QWEN_2_MOE,
    "granitemoeshared granitemoehybrid granitemoe_swa": GRANITE_MOE_SHARED,
    "afmoe": replace(
        DEEPSEEK,
        stream="pre_mlp_layernorm",
        inner=("mlp.router.gate", *DEEPSEEK.inner[1:]),
        scale="post_mlp_layernorm",
        otherwise=replace(LLAMA, stream="pre_mlp_layernorm", scale="post_mlp_layernorm"),
    ),
    "axk1": replace(DEEPSEEK, scale="mlp.post_mlp_layernorm"),
    "kolibri1": replace(DEEPSEEK, scale="post_mlp_layernorm"),
    "zaya": replace(
        MIXTRAL,
        inner=("mlp.gate.down_proj", "mlp.experts.gate_up_proj"),
        multiplier="post_mlp_residual_scale.hidden_states_scale",
        skip_multiplier="post_mlp_residual_scale.residual_scale",
    ),
    # The attention.
    "beam dory hy_v4 llama4_text": ATTENTION,
    "dbrx": replace(ATTENTION, blocks="transformer.blocks", stream="norm_attn_norm.attn", inner=("norm_attn_norm.attn.out_proj",)),
    "deepseek_v4": replace(ATTENTION, inner=("self_attn.o_b_proj",)),
    "longcat_flash": replace(ATTENTION, stream="self_attn.0", inner=("self_attn.0.o_proj", "self_attn.1.o_proj")),
    # No MLP.
    "mamba mamba2 falcon_mamba": MAMBA,
    "rwkv": Anatomy("rwkv.blocks", "ln2", ("attention.output", "feed_forward.key", "feed_forward.receptance"), None),
    "nemotron_h": NEMOTRON_H,
    "zamba2": ZAMBA_2,
}
ARCHITECTURES.update({name: entry for names, entry in _KINDS.items() for name in names.split()})


class Architectures(dict[str, Anatomy | Callable[[Any], Anatomy]]):
    """Entries by ``model_type``; printed, and in a notebook, a table."""

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, style: str) -> str:
        rows = [_row(name, entry) for name, entry in sorted(self.items())]
        return tabulate(rows, ("model_type", "blocks", "stream", "inner", "outer", "further fields"), tablefmt=style)


def _row(name: str, entry: Anatomy | Callable[[Any], Anatomy]) -> list[str | None]:
    if not isinstance(entry, Anatomy):
        return [name, None, None, None, None, f"by the model's options: {entry.__doc__ or entry.__name__}"]
    further = [f"{f.name}={getattr(entry, f.name)!r}" for f in fields(entry) if f.kw_only and getattr(entry, f.name) != f.default]
    return [name, entry.blocks, entry.stream, ", ".join(entry.inner), entry.outer, ", ".join(further)]


def architectures() -> Architectures:
    """Return the entries of all known values of ``model.config.model_type``: a mapping that prints as a table.

    An entry is an :class:`~icl_lib.models.anatomy.Anatomy`, or a function that returns it for a model, where it depends
    on the model's options. A change of the mapping does not change what is known; see
    :func:`~icl_lib.models.anatomy.register_anatomy` for that.

    >>> known = architectures()
    >>> known["mistral"]
    Anatomy(blocks='model.layers', stream='post_attention_layernorm', inner=('mlp.gate_proj', 'mlp.up_proj'), \
outer='mlp.down_proj')
    >>> len(known) > 100
    True
    >>> print(Architectures(gptj=known["gptj"], phi3=known["phi3"]))
    """
    return Architectures(ARCHITECTURES)
