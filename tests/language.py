"""Small language models of every architecture, with random weights under which logits are not flat."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from torch import Tensor, nn

VOCABULARY, LENGTH = 97, 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_positions": 128, "n_embd": 32, "n_layer": 6, "n_head": 4}
_GPT |= {"bos_token_id": 0, "eos_token_id": 0}
_OPT = {name: value for name, value in _SHAPE.items() if name != "intermediate_size"}
_OPT |= {"ffn_dim": 64, "word_embed_proj_dim": 32}
_GROUPED: dict[str, Any] = {**_SHAPE, "num_key_value_heads": 2}
_MIXTURE: dict[str, Any] = {**_GROUPED, "num_experts_per_tok": 2}
CONFIGS = {
    "GPT-2": lambda: transformers.GPT2Config(**_GPT),
    "OPT": lambda: transformers.OPTConfig(**_OPT),
    "OPT, post-norm": lambda: transformers.OPTConfig(**_OPT, do_layer_norm_before=False),
    "Llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "Mistral": lambda: transformers.MistralConfig(**_GROUPED, sliding_window=16),
    "Qwen 2": lambda: transformers.Qwen2Config(**_GROUPED),
    "Qwen 3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8),
    "Phi-3": lambda: transformers.Phi3Config(**_GROUPED),
    # With its own embedding as the read-out, a random Gemma repeats the last token whatever stands before it.
    "Gemma 3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=16, tie_word_embeddings=False
    ),
    "OLMo 2": lambda: transformers.Olmo2Config(**_GROUPED),
    "GPT-NeoX": lambda: transformers.GPTNeoXConfig(**_SHAPE),
    "GPT-NeoX, sequential": lambda: transformers.GPTNeoXConfig(**_SHAPE, use_parallel_residual=False),
    "GPT-J": lambda: transformers.GPTJConfig(**_GPT, rotary_dim=8),
    "Phi": lambda: transformers.PhiConfig(**_SHAPE),
    "Mixtral": lambda: transformers.MixtralConfig(**_MIXTURE, num_local_experts=4),
    "Qwen 3 MoE": lambda: transformers.Qwen3MoeConfig(
        **_MIXTURE, head_dim=8, num_experts=4, moe_intermediate_size=32, decoder_sparse_step=2, norm_topk_prob=False
    ),
}
MIXTURES = ("Mixtral", "Qwen 3 MoE")


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One model of this architecture for all tests; none may change it."""
    return fresh(name, dtype)


def fresh(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> nn.Module:
    """A model of this architecture."""
    config = CONFIGS[name]()
    for option, value in changes.items():
        setattr(config, option, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            else:
                std = 0.5 if "embed" in path or "wte" in path or "wpe" in path else 1.5 * parameter.shape[-1] ** -0.5
                parameter.copy_(std * torch.randn_like(parameter))
    if name in MIXTURES:
        model.set_experts_implementation("eager")  # the only one that runs in float64
    return model.to(dtype)


def prompts(*batch: int, length: int = LENGTH) -> Tensor:
    """Token ids, none of which occurs twice in a prompt."""
    rows = [torch.randperm(VOCABULARY)[:length] for _ in range(torch.Size(batch).numel())]
    return torch.stack(rows).reshape(*batch, length)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The largest relative distance of two answers at a position."""
    return ((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def state(model: nn.Module) -> tuple[list[int], list[str], dict[str, Tensor]]:
    """Hooks, what shadows a parameter, and every number, to be compared afterwards."""
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    shadows = [name for part in model.modules() for name in part._parameters if name in vars(part)]
    return hooks, shadows, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: Any, after: Any) -> bool:
    """Whether two states are equal bit for bit."""
    return before[:2] == after[:2] and all(torch.equal(before[2][name], after[2][name]) for name in before[2])
