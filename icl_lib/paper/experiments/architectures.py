"""Small language models with random weights, one for each architecture, and the identity in each of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.environment import extra
from icl_lib.measures import relative_error
from icl_lib.models.absorb import absorb
from icl_lib.validation import require_size

VOCABULARY = 97
"""The number of tokens in the vocabulary of the small models."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_head": 4}
_GPT |= {"bos_token_id": 0, "eos_token_id": 0}
_OPT = {name: value for name, value in _SHAPE.items() if name != "intermediate_size"}
_OPT |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_MIXTURE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", _GPT),
    "OPT": ("OPTConfig", _OPT),
    "OPT, post-norm": ("OPTConfig", {**_OPT, "do_layer_norm_before": False}),
    "Llama": ("LlamaConfig", _GROUPED),
    "Mistral": ("MistralConfig", {**_GROUPED, "sliding_window": 16}),
    "Qwen 2": ("Qwen2Config", _GROUPED),
    "Qwen 3": ("Qwen3Config", {**_GROUPED, "head_dim": 8}),
    "Phi-3": ("Phi3Config", _GROUPED),
    # With tied embeddings, a Gemma with random weights repeats the last token whatever precedes it.
    "Gemma 3": ("Gemma3TextConfig", {**_GROUPED, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": False}),
    "OLMo 2": ("Olmo2Config", _GROUPED),
    "GPT-NeoX": ("GPTNeoXConfig", _SHAPE),
    "GPT-NeoX, sequential": ("GPTNeoXConfig", {**_SHAPE, "use_parallel_residual": False}),
    "GPT-J": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "Phi": ("PhiConfig", _SHAPE),
    "Mixtral": ("MixtralConfig", {**_MIXTURE, "num_local_experts": 4}),
    "Qwen 3 MoE": (
        "Qwen3MoeConfig",
        {
            **_MIXTURE,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
    ),
}
"""The architectures of the book's main tables: the class of their configuration in `transformers`, and its options."""


class _Cycle(tuple):
    """The value of an option with one entry for each block: these entries in turn."""

    def over(self, blocks: int) -> list[Any]:
        """Return one entry for each block.

        >>> _Cycle(("conv", "full_attention")).over(3)
        ['conv', 'full_attention', 'conv']
        """
        return [self[block % len(self)] for block in range(blocks)]


# Architectures name their options differently, and ignore those that they do not have: one dictionary serves a kind.
_DECODER: dict[str, Any] = {**_GROUPED, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": False}
_EXPERTS: dict[str, Any] = {
    **_DECODER,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "n_group", "topk_group"), 1),
}
# On a CPU, a sigmoid of fewer numbers in float32 may round differently for one token than for many.
_SIGMOID: dict[str, Any] = {**_EXPERTS, **dict.fromkeys(("num_experts", "num_local_experts"), 32)}
# Keys and values from a vector of low width, and in some models only from the tokens that a small indexer picks.
_LATENT: dict[str, Any] = {
    **_EXPERTS,
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "index_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_topk"), 8),
    **dict.fromkeys(("num_key_value_heads", "index_n_heads"), 4),
}
_LINEAR: dict[str, Any] = {
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    "layer_types": _Cycle(("linear_attention", "full_attention")),
}
_MAMBA: dict[str, Any] = {
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
}
_ROPE = {kind: {"rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
_CONVOLUTION: dict[str, Any] = {"layer_types": _Cycle(("conv", "full_attention"))}
_ENCODER: dict[str, Any] = {**_SHAPE, "is_decoder": True, "tie_word_embeddings": False, "embedding_size": 32}
# The decoder of a pair; the encoder is not built.
_PAIR: dict[str, Any] = {
    **_SHAPE,
    "d_model": 32,
    "tie_word_embeddings": False,
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
}
_UNTIED: dict[str, Any] = {**_GPT, "tie_word_embeddings": False}
_WIDTH: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "tie_word_embeddings": False}
_HALF: dict[str, Any] = {"residual_multiplier": 0.5}

MORE_LANGUAGE_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Like Llama, whatever the attention is
    "BitNet": ("BitNetConfig", _DECODER),
    "CWM": ("CwmConfig", _DECODER),
    "DiffLlama": ("DiffLlamaConfig", _DECODER),
    "ERNIE 4.5": ("Ernie4_5Config", _DECODER),
    "EXAONE": ("ExaoneConfig", _DECODER),
    "Gemma": ("GemmaConfig", _DECODER),
    "Helium": ("HeliumConfig", _DECODER),
    "Hunyuan": ("HunYuanDenseV1Config", _DECODER),
    "InternLM 3": ("InternLM3Config", _DECODER),
    "IQuest-Coder": ("IQuestCoderConfig", _DECODER),
    "Ministral": ("MinistralConfig", _DECODER),
    "Ministral 3": ("Ministral3Config", _DECODER),
    "OLMo": ("OlmoConfig", _DECODER),
    "Qwen 3.5": ("Qwen3_5TextConfig", {**_DECODER, **_LINEAR}),
    "Seed-OSS": ("SeedOssConfig", _DECODER),
    "SmolLM 3": ("SmolLM3Config", _DECODER),
    "Youtu": ("YoutuConfig", _LATENT),
    "Bamba": ("BambaConfig", {**_DECODER, **_MAMBA, "attn_layer_indices": [1]}),
    "LFM 2": ("Lfm2Config", {**_DECODER, **_CONVOLUTION}),
    "VaultGemma": ("VaultGemmaConfig", _DECODER),
    "RecurrentGemma": ("RecurrentGemmaConfig", {**_DECODER, "block_types": ["recurrent", "attention"]}),
    "xLSTM": ("xLSTMConfig", {**_SHAPE, "num_heads": 4}),
    # One inner map
    "GLM": ("GlmConfig", _DECODER),
    "Arcee": ("ArceeConfig", _DECODER),
    "Jais 2": ("Jais2Config", _DECODER),
    "Nemotron": ("NemotronConfig", _DECODER),
    "Apertus": ("ApertusConfig", _DECODER),
    "Apertus 1.5": ("Apertus1p5TextConfig", _DECODER),
    "nanochat": ("NanoChatConfig", _DECODER),
    "ModernBERT": ("ModernBertDecoderConfig", _DECODER),
    "GPT-BigCode": ("GPTBigCodeConfig", _UNTIED),
    "GPT-Neo": ("GPTNeoConfig", {**_SHAPE, "attention_types": _Cycle(([["global"], 1], [["local"], 1]))}),
    "StarCoder 2": ("Starcoder2Config", _DECODER),
    "Persimmon": ("PersimmonConfig", _DECODER),
    "GPT-NeoX Japanese": ("GPTNeoXJapaneseConfig", _DECODER),
    "BLOOM": ("BloomConfig", {**_SHAPE, "tie_word_embeddings": False}),
    "BLOOM, normed": (
        "BloomConfig",
        {**_SHAPE, "tie_word_embeddings": False, "apply_residual_connection_post_layernorm": True},
    ),
    "MPT": ("MptConfig", {**_WIDTH, "n_heads": 4, "max_seq_len": 128}),
    "CTRL": ("CTRLConfig", {**_UNTIED, "dff": 64}),
    "BigBird-Pegasus": ("BigBirdPegasusConfig", _PAIR),
    "Blenderbot": ("BlenderbotConfig", _PAIR),
    "mBART": ("MBartConfig", _PAIR),
    "Pegasus": ("PegasusConfig", _PAIR),
    "XGLM": ("XGLMConfig", {**_WIDTH, "attention_heads": 4, "ffn_dim": 64}),
    "BioGPT": ("BioGptConfig", _ENCODER),
    "Megatron-BERT": ("MegatronBertConfig", _ENCODER),
    # The norm belongs to the stream
    "OpenAI GPT": ("OpenAIGPTConfig", _UNTIED),
    "BART": ("BartConfig", _PAIR),
    "Blenderbot, small": ("BlenderbotSmallConfig", _PAIR),
    "Marian": ("MarianConfig", _PAIR),
    "MVP": ("MvpConfig", _PAIR),
    "PLBart": ("PLBartConfig", _PAIR),
    "TrOCR": ("TrOCRConfig", _PAIR),
    "BERT": ("BertConfig", _ENCODER),
    "BERT Generation": ("BertGenerationConfig", _ENCODER),
    "BigBird": ("BigBirdConfig", {**_ENCODER, "attention_type": "original_full"}),
    "ELECTRA": ("ElectraConfig", _ENCODER),
    "ERNIE": ("ErnieConfig", _ENCODER),
    "RemBERT": ("RemBertConfig", {**_ENCODER, "input_embedding_size": 32, "output_embedding_size": 32}),
    "RoCBert": ("RoCBertConfig", {**_ENCODER, "pronunciation_vocab_size": 8, "shape_vocab_size": 8}),
    "RoFormer": ("RoFormerConfig", _ENCODER),
    # Factors on the stream or on the output of the MLP
    "Granite": ("GraniteConfig", {**_DECODER, **_HALF}),
    "Granite, sliding window": ("GraniteSWAConfig", {**_DECODER, **_HALF}),
    "MiniCPM 3": ("MiniCPM3Config", _LATENT),
    "Falcon-H1": ("FalconH1Config", {**_DECODER, **_MAMBA, "mamba_d_ssm": 64, "mlp_multipliers": [0.5, 0.5]}),
    "Doge": ("DogeConfig", _DECODER),
    # A norm between the MLP and the stream
    "Gemma 2": ("Gemma2Config", _DECODER),
    "Gemma 4": (
        "Gemma4TextConfig",
        {**_DECODER, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
    ),
    "Gemma 4, unified": ("Gemma4UnifiedTextConfig", {**_DECODER, "global_head_dim": 8}),
    "OLMo 3": ("Olmo3Config", _DECODER),
    "OLMo Hybrid": ("OlmoHybridConfig", {**_DECODER, **_LINEAR}),
    "EXAONE 4": ("Exaone4Config", _DECODER),
    "GLM 4": ("Glm4Config", _DECODER),
    "HyperCLOVA X": ("HyperCLOVAXConfig", {**_DECODER, **_HALF}),
    "HyperCLOVA X, pre-norm": ("HyperCLOVAXConfig", {**_DECODER, **_HALF, "use_post_norm": False}),
    "LFM 3": ("Lfm3Config", {**_DECODER, **_CONVOLUTION}),
    "LFM 3, pre-norm": ("Lfm3Config", {**_DECODER, **_CONVOLUTION, "use_sandwich_norm": False}),
    # Parallel
    "CodeGen": ("CodeGenConfig", {**_UNTIED, "rotary_dim": 8}),
    "Cohere": ("CohereConfig", _DECODER),
    "Cohere 2": ("Cohere2Config", _DECODER),
    "Cohere 2 MoE": ("Cohere2MoeConfig", _EXPERTS),
    "Cohere Compass": (
        "CohereCompassTextConfig",
        {**_DECODER, "rope_parameters": _ROPE},
    ),
    "Falcon": ("FalconConfig", {**_SHAPE, "tie_word_embeddings": False}),
    "Falcon, sequential": ("FalconConfig", {**_SHAPE, "tie_word_embeddings": False, "parallel_attn": False}),
    "StableLM": ("StableLmConfig", _DECODER),
    "StableLM, parallel": ("StableLmConfig", {**_DECODER, "use_parallel_residual": True}),
    # Experts
    "MiniMax M2": ("MiniMaxM2Config", _SIGMOID),
    "OLMoE": ("OlmoeConfig", _EXPERTS),
    "Mellum": ("MellumConfig", _EXPERTS),
    "MiMo V2 Flash": ("MiMoV2FlashConfig", _EXPERTS),
    "Phi-MoE": ("PhimoeConfig", _EXPERTS),
    "gpt-oss": ("GptOssConfig", _EXPERTS),
    "Jamba": ("JambaConfig", {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "LFM 2 MoE": ("Lfm2MoeConfig", {**_EXPERTS, **_CONVOLUTION}),
    "MiniMax": ("MiniMaxConfig", {**_EXPERTS, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 0.5}),
    "Zaya": ("ZayaConfig", {**_EXPERTS, "num_experts_per_tok": 1, "router_hidden_size": 32}),
    "FlexOlmo": ("FlexOlmoConfig", _EXPERTS),
    "Gemma 4, experts": (
        "Gemma4TextConfig",
        {**_EXPERTS, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "enable_moe_block": True},
    ),
    # Experts beside a shared one
    "DeepSeek V2": ("DeepseekV2Config", _LATENT),
    "DeepSeek V3": ("DeepseekV3Config", _LATENT),
    "DeepSeek V3.2": ("DeepseekV32Config", _LATENT),
    "A.X K2": ("AXK2Config", _LATENT),
    "Bailing Hybrid": ("BailingHybridConfig", {**_LATENT, **_LINEAR}),
    "dots.llm1": ("Dots1Config", _EXPERTS),
    "dots.note": ("Dots3NoteTextConfig", _LATENT),
    "EXAONE MoE": ("ExaoneMoeConfig", _EXPERTS),
    "GLM 4 MoE": ("Glm4MoeConfig", _EXPERTS),
    "GLM 4 MoE Lite": ("Glm4MoeLiteConfig", _LATENT),
    "GLM MoE DSA": ("GlmMoeDsaConfig", _LATENT),
    "HY V3": ("HYV3Config", {**_EXPERTS, "enable_moe_fp32_combine": False}),
    "Kimi Linear": ("KimiLinearConfig", {**_LATENT, **_LINEAR}),
    "Laguna": ("LagunaConfig", _SIGMOID),
    "Sarvam MLA": ("SarvamMLAConfig", _LATENT),
    "Sarvam MoE": ("SarvamMoEConfig", _EXPERTS),
    "Solar Open": ("SolarOpenConfig", _EXPERTS),
    "ERNIE 4.5 MoE": ("Ernie4_5_MoeConfig", _EXPERTS),
    "ERNIE 4.5 MoE, none shared": ("Ernie4_5_MoeConfig", {**_EXPERTS, "moe_num_shared_experts": 0}),
    "Aria": ("AriaTextConfig", _EXPERTS),
    "MiniMax M3": ("MiniMaxM3VLTextConfig", {**_LATENT, **_SIGMOID, "mlp_layer_types": _Cycle(("dense", "sparse"))}),
    "Hunyuan MoE": ("HunYuanMoEV1Config", _EXPERTS),
    "Flint": ("FlintConfig", {**_EXPERTS, "mlp_only_layers": [0]}),
    "Lara Mini": ("LaraMiniConfig", {**_EXPERTS, **_LINEAR}),
    "Qwen 2 MoE": ("Qwen2MoeConfig", {**_EXPERTS, "mlp_only_layers": [0]}),
    "Qwen 3 Next": ("Qwen3NextConfig", {**_EXPERTS, **_LINEAR}),
    "Qwen 3.5 MoE": ("Qwen3_5MoeTextConfig", {**_EXPERTS, **_LINEAR}),
    "Granite MoE": ("GraniteMoeConfig", {**_EXPERTS, **_HALF}),
    "Granite MoE, shared": ("GraniteMoeSharedConfig", {**_EXPERTS, **_HALF}),
    "Granite MoE, sliding window": ("GraniteMoeSWAConfig", {**_EXPERTS, **_HALF}),
    "Granite Hybrid": ("GraniteMoeHybridConfig", {**_EXPERTS, **_HALF, **_MAMBA, **_LINEAR}),
    "Granite Hybrid, dense": (
        "GraniteMoeHybridConfig",
        {**_EXPERTS, **_HALF, **_MAMBA, **_LINEAR, "num_local_experts": 0},
    ),
    "AFMoE": ("AfmoeConfig", _SIGMOID),
    "A.X K1": ("AXK1Config", _LATENT),
    "Kolibri": ("Kolibri1Config", _EXPERTS),
    # No MLP, or one that is left as it is
    "Mamba": ("MambaConfig", {**_SHAPE, **_MAMBA}),
    "Mamba 2": ("Mamba2Config", {**_SHAPE, **_MAMBA}),
    "Falcon Mamba": ("FalconMambaConfig", {**_SHAPE, **_MAMBA}),
    "Nemotron-H": (
        "NemotronHConfig",
        {**_EXPERTS, **_MAMBA, "layers_block_type": _Cycle(("linear_attention", "full_attention", "mlp", "moe"))},
    ),
    "Zamba 2": ("Zamba2Config", {**_SHAPE, **_MAMBA, "layers_block_type": _Cycle(("linear_attention", "hybrid"))}),
    "Beam": ("BeamConfig", _EXPERTS),
    "Llama 4": ("Llama4TextConfig", _SIGMOID),
    "DBRX": (
        "DbrxConfig",
        {
            **_WIDTH,
            "n_heads": 4,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "RWKV": ("RwkvConfig", {**_SHAPE, "rescale_every": 0}),
}
"""More architectures, in the same form; the kinds are those of :mod:`icl_lib.models.architectures`."""

_ALL = LANGUAGE_MODELS | MORE_LANGUAGE_MODELS

NARROW: dict[str, str] = {
    "XGLM": "all",  # its attention does not run in float64
    "RecurrentGemma": "the recurrence",
    **dict.fromkeys(
        (
            *("DeepSeek V2", "DeepSeek V3", "DeepSeek V3.2", "A.X K2", "Bailing Hybrid", "dots.llm1", "dots.note"),
            *("EXAONE MoE", "GLM 4 MoE", "GLM 4 MoE Lite", "GLM MoE DSA", "HY V3", "Kimi Linear", "Sarvam MLA"),
            *("Sarvam MoE", "Solar Open", "ERNIE 4.5 MoE", "ERNIE 4.5 MoE, none shared", "Flint", "Lara Mini"),
            *("MiMo V2 Flash", "A.X K1", "Kolibri", "Nemotron-H"),
        ),
        "the router",
    ),
}
"""What computes in float32 in a model in float64, so that the identity holds to about 1e-7 only.

Where the scale of a norm alone takes the change (A.X K1, Kolibri), it may hold less well: this edit is large where the
output of the norm is small.
"""


def small_language_model(
    name: str, dtype: torch.dtype = torch.float64, blocks: int = 6, seed: int = 0, **options: Any
) -> nn.Module:
    """Build a small model of this architecture from its configuration; the same call returns the same weights.

    The weights are random. They are large enough that the logits differ and depend on the context.

    Args:
        name: one of ``LANGUAGE_MODELS`` or ``MORE_LANGUAGE_MODELS``.
        blocks: the number of blocks.
        options: options of the configuration that replace those in the table.

    Raises `ValueError` for another name, and for an architecture that the installed `transformers` does not have. Needs
    this package (the extra ``[llm]``).

    >>> model = small_language_model("Llama", blocks=2)
    >>> type(model).__name__, len(model.model.layers)
    ('LlamaForCausalLM', 2)
    """
    with extra("llm"):
        import transformers

    if name not in _ALL:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(_ALL)}.")
    require_size("blocks", blocks)
    config_class, settings = _ALL[name]
    if not hasattr(transformers, config_class):
        raise ValueError(
            f"name is {name!r}, but transformers {transformers.__version__} has no {config_class}: install a newer "
            "version."
        )
    settings = {key: value.over(blocks) if isinstance(value, _Cycle) else value for key, value in settings.items()}
    depth = "n_layer" if "n_embd" in settings else "num_hidden_layers"
    depth = "decoder_layers" if "decoder_ffn_dim" in settings else depth
    config = getattr(transformers, config_class)(**{**settings, depth: blocks, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                embeds = any(part in path for part in ("embed", "wte", "wpe"))
                parameter.copy_((0.5 if embeds else 1.5 * parameter.shape[-1] ** -0.5) * torch.randn_like(parameter))
    model.set_experts_implementation("eager")  # the only implementation that runs in float64
    return model.to(dtype)


def survey(names: Iterable[str] | None = None, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Replace a prompt by weight edits in a small model of each architecture, and compare.

    The prompt has 24 different tokens. A copy of the model with edited weights reads the last one alone
    (:meth:`icl_lib.models.patch.Patch.merged`).

    Args:
        names: of ``LANGUAGE_MODELS`` and ``MORE_LANGUAGE_MODELS``; None for all that the installed `transformers` has.
        dtype: of the models; those that compute all in float32 (``NARROW``) are in float32.

    Returns a row for each name, with these keys:

    - ``name``, and ``model_type`` as in :func:`icl_lib.models.architectures.architectures`;
    - ``error``: the relative difference between the logits of the copy and those of the model after the whole prompt;
    - ``control``: the same for the model itself, without edits;
    - ``passes``: the runs of the model in which the edits are found;
    - ``unchanged``: whether the model's state is, bit for bit, what it was before;
    - ``float32``: what computes in float32 in a model in float64: ``all``, ``the router`` or an empty string.

    >>> [row] = survey(["Gemma 2"])
    >>> row["model_type"], row["error"] < 1e-12, row["control"] > 1e-2, row["unchanged"], row["float32"]
    ('gemma2', True, True, True, '')
    """
    if names is None:
        with extra("llm"):
            import transformers

        names = [name for name, (config_class, _) in _ALL.items() if hasattr(transformers, config_class)]
    return [_row(name, dtype) for name in names]


@torch.no_grad()
def _row(name: str, dtype: torch.dtype) -> dict[str, Any]:
    narrow = NARROW.get(name, "")
    kinds = [len(value) for value in _ALL.get(name, ("", {}))[1].values() if isinstance(value, _Cycle)]
    model = small_language_model(name, torch.float32 if narrow == "all" else dtype, max([2, *kinds]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = 1 + torch.randperm(VOCABULARY - 1, generator=torch.Generator().manual_seed(0))[None, :24]

    def logits(model: nn.Module, **call: Tensor) -> Tensor:
        # Some models read a state that a cache holds, and do so in float32.
        cache = {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}
        return model(**call, **cache).logits[:, -1]

    runs = []
    counter = model.register_forward_pre_hook(lambda *_: runs.append(1))
    patch = absorb(model, ids, ids.shape[1] - 1)
    counter.remove()
    wanted, bare = logits(model, input_ids=ids), patch.bare(ids)
    return {
        "name": name,
        "model_type": model.config.model_type,
        "error": relative_error(logits(patch.merged(model), **bare), wanted).item(),
        "control": relative_error(logits(model, **bare), wanted).item(),
        "passes": len(runs),
        "unchanged": all(torch.equal(before[key], value) for key, value in model.state_dict().items()),
        "float32": narrow,
    }
