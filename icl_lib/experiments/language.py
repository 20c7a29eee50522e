"""Small language models of every architecture, with random weights: what can be verified without any download."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from icl_lib.validation import require_size

VOCABULARY = 97
"""Tokens that the small models know."""

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
    # With its own embedding as the read-out, a random Gemma repeats the last token whatever stands before it.
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
"""What tells the architectures apart: the class of the configuration in `transformers`, and its options."""


def small_language_model(
    name: str, dtype: torch.dtype = torch.float64, blocks: int = 6, seed: int = 0, **options: Any
) -> nn.Module:
    """A small model of this architecture, built from its configuration; the same call gives the same weights.

    The weights are random and large enough that the logits are not flat, so that the context matters.

    Args:
        name: one of ``LANGUAGE_MODELS``.
        blocks: how many blocks it has.
        options: of its configuration, instead of those in ``LANGUAGE_MODELS``.

    Raises `ValueError` for another name. Needs the package `transformers` (the extra ``[llm]``).

    >>> model = small_language_model("Llama", blocks=2)
    >>> type(model).__name__, len(model.model.layers)
    ('LlamaForCausalLM', 2)
    """
    import transformers

    if name not in LANGUAGE_MODELS:
        raise ValueError(f"name is {name!r}: choose one of {', '.join(LANGUAGE_MODELS)}.")
    require_size("blocks", blocks)
    config_class, settings = LANGUAGE_MODELS[name]
    depth = {"n_layer" if "n_embd" in settings else "num_hidden_layers": blocks}
    config = getattr(transformers, config_class)(**{**settings, **depth, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                embeds = any(part in path for part in ("embed", "wte", "wpe"))
                parameter.copy_((0.5 if embeds else 1.5 * parameter.shape[-1] ** -0.5) * torch.randn_like(parameter))
    if name in ("Mixtral", "Qwen 3 MoE"):
        model.set_experts_implementation("eager")  # the only one that runs in float64
    return model.to(dtype)
