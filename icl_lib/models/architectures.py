r"""The anatomies of causal language models of Hugging Face, one entry for each ``model_type``.

- Sequential blocks (GPT-2, Llama, Qwen 3, BERT and BART as decoders): the inner maps are edited, then the last map or
  its bias.
- Blocks with a norm after the MLP (Gemma 3, OLMo 2): the inner maps, then the last map and the norm's scale, or the
  scale alone.
- Parallel blocks (GPT-NeoX as in Pythia, GPT-J, Falcon, Cohere): only the last map or its bias, since the MLP reads the
  input of the block, which is the same with and without the context once the earlier blocks are edited.
- Experts (Mixtral, DeepSeek): the router, the inner maps of each active expert and those of a shared expert; then the
  last map of the shared expert or, where there is none or a gate weighs it, that of each active expert. A norm after
  the sum of both takes the change alone, by its scale.
- Blocks without an MLP (Mamba): the last map of the mixer alone. All that depends on the context passes through it.

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

Entry = Anatomy | Callable[[Any], Anatomy]
"""An anatomy, or a function that returns the one of a model."""

# A norm reads the stream, and two maps or one read the norm.
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
LFM_2 = Anatomy("model.layers", "ffn_norm", ("feed_forward.w1", "feed_forward.w3"), "feed_forward.w2")
BAMBA = Anatomy(
    blocks="model.layers",
    stream="pre_ff_layernorm",
    inner=("feed_forward.gate_proj", "feed_forward.up_proj"),
    outer="feed_forward.down_proj",
)

# The norm before the MLP belongs to the stream, so the MLP reads the stream itself.
BERT = Anatomy("bert.encoder.layer", "intermediate", ("intermediate.dense",), "output.dense")

# A norm between the MLP and the stream. In OLMo 2 it is the only one, so the MLP reads the stream itself.
GEMMA_3 = replace(LLAMA, stream="pre_feedforward_layernorm", scale="post_feedforward_layernorm")
OLMO_2 = replace(LLAMA, stream="mlp", scale="post_feedforward_layernorm")

# Attention and MLP side by side.
GPT_J = Anatomy(blocks="transformer.h", stream="attn", inner=(), outer="mlp.fc_out", parallel=True)
PHI = Anatomy(blocks="model.layers", stream="self_attn", inner=(), outer="mlp.fc2", parallel=True)
COHERE = replace(PHI, outer="mlp.down_proj")

# Experts, some with dense blocks in between.
MIXTRAL = replace(LLAMA, inner=("mlp.gate", "mlp.experts.gate_up_proj"), outer="mlp.experts.down_proj")
QWEN_3_MOE = replace(MIXTRAL, otherwise=LLAMA)
PHI_MOE = replace(MIXTRAL, inner=("mlp.router", "mlp.experts.gate_up_proj"))
JAMBA = replace(
    BAMBA,
    inner=("feed_forward.router", "feed_forward.experts.gate_up_proj"),
    outer="feed_forward.experts.down_proj",
    otherwise=BAMBA,
)
LFM_2_MOE = replace(
    LFM_2,
    inner=("feed_forward.gate", "feed_forward.experts.gate_up_proj"),
    outer="feed_forward.experts.down_proj",
    otherwise=LFM_2,
)
# The experts stand beside the MLP, each with norms of its own, so only the norm of their sum can take the change.
GEMMA_4 = replace(GEMMA_3, inner=(*GEMMA_3.inner, "router.proj", "experts.gate_up_proj"), outer=None, otherwise=GEMMA_3)

# Experts beside a shared one.
DEEPSEEK = replace(
    MIXTRAL,
    inner=(*MIXTRAL.inner, "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    outer="mlp.shared_experts.down_proj",
    otherwise=LLAMA,
)
FLINT = replace(
    MIXTRAL,
    inner=(*MIXTRAL.inner, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    outer="mlp.shared_expert.down_proj",
    otherwise=LLAMA,
)
QWEN_2_MOE = replace(FLINT, inner=(*FLINT.inner, "mlp.shared_expert_gate"), outer=MIXTRAL.outer)
AFMOE = replace(
    DEEPSEEK,
    stream="pre_mlp_layernorm",
    inner=("mlp.router.gate", *DEEPSEEK.inner[1:]),
    outer=None,
    scale="post_mlp_layernorm",
    otherwise=replace(LLAMA, stream="pre_mlp_layernorm", scale="post_mlp_layernorm"),
)
# Granite MoE has no shared expert in some models, and no others in some.
_GRANITE = replace(LLAMA, multiplier="residual_multiplier")
_EXPERTS = ("block_sparse_moe.router", "block_sparse_moe.experts.gate_up_proj")
_SHARED = replace(_GRANITE, inner=("shared_mlp.input_linear",), outer="shared_mlp.output_linear")
GRANITE_MOE = replace(_GRANITE, inner=_EXPERTS, outer="block_sparse_moe.experts.down_proj", otherwise=_SHARED)
GRANITE_MOE_SHARED = replace(_SHARED, inner=(*_EXPERTS, *_SHARED.inner), otherwise=GRANITE_MOE)

# No MLP: the last map of the mixer.
MAMBA = Anatomy("backbone.layers", "norm", ("mixer.out_proj",), None)
# A single sublayer in each block. An MLP or experts read nothing that the context changes: any of their maps will do.
_MIXER = replace(MAMBA, blocks="model.layers")
_ALONE = replace(_MIXER, inner=("mixer.up_proj",), outer="mixer.down_proj")
_EXPERTS_ALONE = replace(_MIXER, inner=("mixer.gate",), outer="mixer.shared_experts.down_proj", otherwise=_ALONE)
NEMOTRON_H = replace(_MIXER, otherwise=replace(_MIXER, inner=("mixer.o_proj",), otherwise=_EXPERTS_ALONE))
ZAMBA_2 = Anatomy(
    blocks="model.layers",
    stream="mamba",
    inner=("mamba.out_proj",),
    outer=None,
    otherwise=Anatomy("model.layers", "mamba_decoder.mamba", ("mamba_decoder.mamba.out_proj",), None),
)
# The experts, or the factors in the block, are in a form that Anatomy does not have: the last map of the attention.
ATTENTION = Anatomy("model.layers", "self_attn", ("self_attn.o_proj",), None)


def _opt(model: Any) -> Anatomy:
    """The MLP reads the stream itself if the norms follow the sublayers."""
    return OPT if model.config.do_layer_norm_before else replace(OPT, stream="fc1")


def _bloom(model: Any) -> Anatomy:
    """The norm before the MLP may belong to the stream."""
    normed = model.config.apply_residual_connection_post_layernorm
    return replace(GPT_NEOX, blocks="transformer.h", stream="mlp" if normed else GPT_NEOX.stream)


def _gpt_neox(model: Any) -> Anatomy:
    """Parallel or sequential."""
    parallel = model.config.use_parallel_residual
    return replace(GPT_NEOX, stream="attention", inner=(), parallel=True) if parallel else GPT_NEOX


def _falcon(model: Any) -> Anatomy:
    """Parallel or sequential."""
    falcon = replace(GPT_NEOX, blocks="transformer.h")
    parallel = model.config.new_decoder_architecture or model.config.parallel_attn
    return replace(falcon, stream="self_attention", inner=(), parallel=True) if parallel else falcon


def _stablelm(model: Any) -> Anatomy:
    """Parallel or sequential."""
    return COHERE if model.config.use_parallel_residual else LLAMA


def _cohere2_moe(model: Any) -> Anatomy:
    """Parallel; the mean of the experts and of a shared one, or their sum."""
    mean = model.config.num_shared_experts and model.config.shared_expert_combination_strategy == "average"
    return replace(COHERE, outer=MIXTRAL.outer, multiplier=0.5 if mean else 1.0, otherwise=COHERE)


def _hyperclovax(model: Any) -> Anatomy:
    """With or without a norm after the MLP."""
    return replace(_GRANITE, scale="post_norm2" if model.config.use_post_norm else None)


def _lfm3(model: Any) -> Anatomy:
    """With or without a norm after the MLP."""
    return replace(LFM_2, scale="post_ffn_norm" if model.config.use_sandwich_norm else None)


_KINDS: dict[str, Entry] = {
    # Like Llama, whatever the attention is.
    "llama bitnet cwm diffllama ernie4_5 exaone gemma helium hunyuan_v1_dense internlm3 iquestcoder ministral": LLAMA,
    "ministral3 mistral olmo qwen2 qwen3 qwen3_5_text seed_oss smollm3 youtu": LLAMA,
    "bamba": BAMBA,
    "lfm2": LFM_2,
    "vaultgemma": replace(LLAMA, stream="pre_feedforward_layernorm"),
    "recurrent_gemma": Anatomy(
        "model.layers", "channel_pre_norm", ("mlp_block.gate_proj", "mlp_block.up_proj"), "mlp_block.down_proj"
    ),
    "xlstm": Anatomy("backbone.blocks", "norm_ffn", ("ffn.proj_up_gate", "ffn.proj_up"), "ffn.proj_down"),
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
    "bigbird_pegasus blenderbot mbart pegasus": OPT,
    "xglm": replace(OPT, blocks="model.layers"),
    "biogpt": replace(OPT, blocks="biogpt.layers"),
    "megatron-bert": replace(BERT, stream="ln"),
    # The norm belongs to the stream.
    "openai-gpt": replace(GPT_2, stream="mlp"),
    "bart blenderbot-small marian mvp plbart trocr": replace(OPT, stream="fc1"),
    "bert bert-generation big_bird": BERT,
    "electra": replace(BERT, blocks="electra.encoder.layer"),
    "ernie": replace(BERT, blocks="ernie.encoder.layer"),
    "rembert": replace(BERT, blocks="rembert.encoder.layer"),
    "roc_bert": replace(BERT, blocks="roc_bert.encoder.layer"),
    "roformer": replace(BERT, blocks="roformer.encoder.layer"),
    # Factors on the stream or on the output of the MLP.
    "granite granite_swa": _GRANITE,
    "minicpm3": replace(LLAMA, multiplier="residual_scale"),
    "falcon_h1": replace(BAMBA, multiplier="feed_forward.down_multiplier"),
    "doge": replace(LLAMA, skip_multiplier="post_attention_residual"),
    # A norm between the MLP and the stream.
    "gemma2 gemma3_text gemma4_unified_text": GEMMA_3,
    "gemma3": replace(GEMMA_3, blocks="model.language_model.layers"),
    "olmo2 olmo3 exaone4": OLMO_2,
    "olmo_hybrid": replace(OLMO_2, otherwise=LLAMA),
    "glm4": replace(PHI_3, scale="post_mlp_layernorm"),
    "hyperclovax": _hyperclovax,
    "lfm3": _lfm3,
    # Parallel.
    "gptj codegen": GPT_J,
    "phi": PHI,
    "cohere cohere2 cohere_compass_text": COHERE,
    "cohere2_moe": _cohere2_moe,
    "gpt_neox": _gpt_neox,
    "falcon": _falcon,
    "stablelm": _stablelm,
    # Experts.
    "mixtral minimax_m2 olmoe": MIXTRAL,
    "qwen3_moe mellum mimo_v2_flash": QWEN_3_MOE,
    "phimoe gpt_oss": PHI_MOE,
    "jamba": JAMBA,
    "lfm2_moe": LFM_2_MOE,
    "minimax": replace(MIXTRAL, stream="mlp", multiplier="mlp_beta_factor", skip_multiplier="mlp_alpha_factor"),
    "zaya": replace(
        MIXTRAL,
        inner=("mlp.gate.down_proj", "mlp.experts.gate_up_proj"),
        multiplier="post_mlp_residual_scale.hidden_states_scale",
        skip_multiplier="post_mlp_residual_scale.residual_scale",
    ),
    "flex_olmo": replace(MIXTRAL, stream="mlp", outer=None, scale="post_feedforward_layernorm"),
    "gemma4_text": GEMMA_4,
    # Experts beside a shared one.
    "deepseek_v2 deepseek_v3 deepseek_v32 axk2 bailing_hybrid dots1 dots3_note_text exaone_moe glm4_moe": DEEPSEEK,
    "glm4_moe_lite glm_moe_dsa hy_v3 kimi_linear laguna sarvam_mla sarvam_moe solar_open": DEEPSEEK,
    "ernie4_5_moe": replace(DEEPSEEK, otherwise=QWEN_3_MOE),
    "aria_text": replace(DEEPSEEK, inner=("mlp.router", *DEEPSEEK.inner[1:])),
    "minimax_m3_vl_text": replace(DEEPSEEK, inner=(*MIXTRAL.inner, "mlp.shared_experts.gate_up_proj"), otherwise=PHI_3),
    "hunyuan_v1_moe": replace(
        MIXTRAL,
        inner=("mlp.gate.wg", "mlp.experts.gate_up_proj", "mlp.shared_mlp.gate_proj", "mlp.shared_mlp.up_proj"),
        outer="mlp.shared_mlp.down_proj",
    ),
    "flint lara_mini": FLINT,
    "qwen2_moe qwen3_next qwen3_5_moe_text": QWEN_2_MOE,
    "granitemoe granitemoeshared granitemoehybrid granitemoe_swa": GRANITE_MOE_SHARED,
    "afmoe": AFMOE,
    "axk1": replace(DEEPSEEK, outer=None, scale="mlp.post_mlp_layernorm"),
    "kolibri1": replace(DEEPSEEK, outer=None, scale="post_mlp_layernorm"),
    # No MLP, or one that is left as it is.
    "mamba mamba2 falcon_mamba": MAMBA,
    "nemotron_h": NEMOTRON_H,
    "zamba2": ZAMBA_2,
    "beam llama4_text": ATTENTION,
    "dbrx": Anatomy("transformer.blocks", "norm_attn_norm.attn", ("norm_attn_norm.attn.out_proj",), None),
    # The MLP, too, reads the token before: its inner maps as well.
    "rwkv": Anatomy(
        "rwkv.blocks", "attention", ("attention.output", "feed_forward.key", "feed_forward.receptance"), None
    ),
}
ARCHITECTURES.update({name: entry for names, entry in _KINDS.items() for name in names.split()})


class Architectures(dict[str, Entry]):
    """Entries by ``model_type``. Printed, and in a notebook, they are a table."""

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, style: str) -> str:
        rows = [_row(name, entry) for name, entry in sorted(self.items())]
        return tabulate(rows, ("model_type", "blocks", "stream", "inner", "outer", "further fields"), tablefmt=style)


def _row(name: str, entry: Entry) -> list[str | None]:
    if not isinstance(entry, Anatomy):
        return [name, *[None] * 4, f"a function of the model. {entry.__doc__ or ''}".strip()]
    named = [(field.name, getattr(entry, field.name), field.default) for field in fields(entry) if field.kw_only]
    further = ", ".join(f"{name}={value!r}" for name, value, usual in named if value != usual)
    return [name, entry.blocks, entry.stream, ", ".join(entry.inner), entry.outer, further]


def architectures() -> Architectures:
    """Return the entries of all values of ``model.config.model_type`` that are known; printed, they are a table.

    An entry is an :class:`~icl_lib.models.anatomy.Anatomy` or, if it depends on the model's options, a function that
    returns the one of a model. What is returned is a copy; :func:`~icl_lib.models.anatomy.register_anatomy` adds a
    class of models.

    >>> known = architectures()
    >>> known["qwen2"] == known["llama"], len(known) > 120
    (True, True)
    >>> print(Architectures({name: known[name] for name in ("phi3", "gptj")}))
    model_type    blocks         stream                    inner             outer          further fields
    ------------  -------------  ------------------------  ----------------  -------------  ----------------
    gptj          transformer.h  attn                                        mlp.fc_out     parallel=True
    phi3          model.layers   post_attention_layernorm  mlp.gate_up_proj  mlp.down_proj
    """
    return Architectures(ARCHITECTURES)
