"""Small language models with random weights, one for each architecture; and edits made from many questions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

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
"""The architectures: the class of their configuration in `transformers`, and its options."""


def small_language_model(
    name: str, dtype: torch.dtype = torch.float64, blocks: int = 6, seed: int = 0, **options: Any
) -> nn.Module:
    """Build a small model of this architecture from its configuration; the same call returns the same weights.

    The weights are random. They are large enough that the logits differ and depend on the context.

    Args:
        name: one of ``LANGUAGE_MODELS``.
        blocks: the number of blocks.
        options: options of the configuration that replace those in ``LANGUAGE_MODELS``.

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
        model.set_experts_implementation("eager")  # the only implementation that runs in float64
    return model.to(dtype)


@torch.no_grad()
def edited_for_questions(
    model: nn.Module, examples: Int[Tensor, " n"], questions: Int[Tensor, "m length"], ridge: float = 1e-2
) -> nn.Module:
    r"""Copy a Llama and edit its MLPs so that, on these questions alone, it computes about what it does after examples.

    Block by block, with the tokens of all questions as columns, the edits are

    $$\Delta V = V (Z_C - Z_0)\, Z_0^\top (Z_0 Z_0^\top + \mu s_Z I)^{-1}, \qquad
      \Delta W_\text{down} = \Delta H\, Y^\top (Y Y^\top + \mu s_Y I)^{-1},$$

    where $s_Z$ and $s_Y$ are the mean eigenvalues of $Z_0 Z_0^\top$ and $Y Y^\top$. As $\mu \to 0$ they become those
    of :func:`icl_lib.theorem.joint_weight_update` if the columns of $Z_0$ and $Y$ are linearly independent, and
    least-squares fits otherwise. $Z_0$ and $Y$ are read in the copy, whose earlier blocks are edited already. No
    gradients are taken.

    Args:
        examples: the token ids that precede every question, and that the edits replace.
        questions: token ids, one question a row.
        ridge: the strength of the ridge, $\mu$.
    """
    rows, length = questions.shape
    with_examples = torch.cat([examples.expand(rows, -1), questions], dim=1)
    alone = {"input_ids": questions, "position_ids": torch.arange(length).expand(rows, -1) + len(examples)}
    edited = copy.deepcopy(model)
    streams, reads = _mlp_inputs(model, length, input_ids=with_examples)
    for block, layer in enumerate(edited.model.layers):
        mlp, (stream, read) = layer.mlp, (part[block] for part in _mlp_inputs(edited, length, **alone))
        for inner in (mlp.gate_proj, mlp.up_proj):
            inner.weight += _ridge_edit(read, (reads[block] - read) @ inner.weight.mT, ridge)
        hidden = mlp.act_fn(mlp.gate_proj(read)) * mlp.up_proj(read)
        mlp.down_proj.weight += _ridge_edit(hidden, streams[block] - stream, ridge)
    return edited


def _mlp_inputs(model: nn.Module, length: int, **call: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The input and the output of each block's norm before the MLP, ``[tokens, width]``, at the last positions."""
    streams, reads = [], []

    def note(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        for kept, tokens in ((streams, args[0]), (reads, output)):
            kept.append(tokens[:, -length:].flatten(0, 1))

    hooks = [layer.post_attention_layernorm.register_forward_hook(note) for layer in model.model.layers]
    try:
        model(**call)
    finally:
        for hook in hooks:
            hook.remove()
    return streams, reads


def _ridge_edit(reads: Float[Tensor, "m in_"], changes: Float[Tensor, "m out"], ridge: float) -> Tensor:
    """The matrix ``[out, in]`` that maps reads to changes, by ridge regression."""
    gram = reads.mT @ reads
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    return torch.linalg.solve(gram, reads.mT @ changes).mT
