r"""The anatomies of language models of Hugging Face, one entry for each ``model_type``.

- Sequential blocks (GPT-2, OPT, Llama, Mistral, Qwen 2 and 3, Phi-3, a variant of GPT-NeoX): the inner maps are edited,
  then the last map or its bias.
- Blocks with a norm after the MLP (Gemma 3, OLMo 2): the inner maps, then the last map and the norm's scale, or the
  scale alone.
- Parallel blocks (GPT-NeoX as in Pythia, GPT-J, Phi): only the last map or its bias, since the MLP reads the input of
  the block, which is the same with and without the context once the earlier blocks are edited.
- Experts (Mixtral, Qwen 3 MoE): the router, then the inner maps and the last map of each active expert.

A model with blocks like one of these needs one more line:

>>> from icl_lib.models.anatomy import ARCHITECTURES
>>> ARCHITECTURES["my_llama"] = LLAMA
>>> del ARCHITECTURES["my_llama"]
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from icl_lib.models.anatomy import ARCHITECTURES, Anatomy

LLAMA = Anatomy(
    blocks="model.layers",
    stream="post_attention_layernorm",
    inner=("mlp.gate_proj", "mlp.up_proj"),
    outer="mlp.down_proj",
)
PHI_3 = replace(LLAMA, inner=("mlp.gate_up_proj",))
GEMMA_3 = replace(LLAMA, stream="pre_feedforward_layernorm", scale="post_feedforward_layernorm")
# No norm before the sublayers: the MLP reads the stream itself.
OLMO_2 = replace(LLAMA, stream="mlp", scale="post_feedforward_layernorm")
MIXTRAL = Anatomy(
    blocks="model.layers",
    stream="post_attention_layernorm",
    inner=("mlp.experts.gate_up_proj",),
    outer="mlp.experts.down_proj",
    router="mlp.gate",
)
GPT_2 = Anatomy(blocks="transformer.h", stream="ln_2", inner=("mlp.c_fc",), outer="mlp.c_proj")
GPT_J = Anatomy(blocks="transformer.h", stream="attn", inner=(), outer="mlp.fc_out", parallel=True)
PHI = Anatomy(blocks="model.layers", stream="self_attn", inner=(), outer="mlp.fc2", parallel=True)


def _opt(model: Any) -> Anatomy:
    # If the norms follow the sublayers, the MLP reads the stream itself.
    stream = "final_layer_norm" if model.config.do_layer_norm_before else "fc1"
    return Anatomy(blocks="model.decoder.layers", stream=stream, inner=("fc1",), outer="fc2")


def _gpt_neox(model: Any) -> Anatomy:
    parallel = model.config.use_parallel_residual
    return Anatomy(
        blocks="gpt_neox.layers",
        stream="attention" if parallel else "post_attention_layernorm",
        inner=() if parallel else ("mlp.dense_h_to_4h",),
        outer="mlp.dense_4h_to_h",
        parallel=parallel,
    )


ARCHITECTURES.update(
    {
        "gemma3": replace(GEMMA_3, blocks="model.language_model.layers"),
        "gemma3_text": GEMMA_3,
        "gpt2": GPT_2,
        "gpt_neox": _gpt_neox,
        "gptj": GPT_J,
        "llama": LLAMA,
        "mistral": LLAMA,
        "mixtral": MIXTRAL,
        "olmo2": OLMO_2,
        "opt": _opt,
        "phi": PHI,
        "phi3": PHI_3,
        "qwen2": LLAMA,
        "qwen3": LLAMA,
        "qwen3_moe": replace(MIXTRAL, otherwise=LLAMA),
    }
)
