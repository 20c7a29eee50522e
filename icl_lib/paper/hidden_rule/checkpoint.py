"""The trained model in two small files, with its accuracy, or as a folder that `transformers` loads."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from icl_lib.models.lora import require_free
from icl_lib.paper.hidden_rule.evaluation import QUERIES, measure, measure_swapped
from icl_lib.paper.hidden_rule.reference import ambiguous
from icl_lib.paper.hidden_rule.task import HELD_OUT, PAIRS, RULES, VOCABULARY
from icl_lib.paper.hidden_rule.training import HiddenRuleTrainer

DATA = Path(__file__).resolve().parent
"""This package, which holds the trained model, so that an installed wheel has it."""

NAME = "hidden_rule"
MEASURED = (0, 1, 2, 3, 4, 5, 6)
REMEDY = "train the model with `python -m icl_lib.paper.hidden_rule`, or give the folder that has it."


def save_hidden_rule(trainer: HiddenRuleTrainer, folder: str | Path = DATA, count: int = 4000) -> dict[str, Any]:
    """Measure a trained model; write ``hidden_rule.safetensors`` and the record ``hidden_rule.json``.

    The record holds the training (``settings``, ``config``, ``versions``, ``curve``), the ``accuracy`` from
    :func:`~icl_lib.paper.hidden_rule.evaluation.measure`, and ``swapped`` from
    :func:`~icl_lib.paper.hidden_rule.evaluation.measure_swapped`. It also holds the pairs ``held_out`` of each rule,
    and under ``ambiguous`` how many of all choices of a rule and one or two examples agree with several rules.

    Args:
        count: the number of prompts in a measurement.
    """
    from safetensors.torch import save_model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{NAME}.safetensors"
    save_model(trainer.model, str(weights))
    record = {
        "settings": asdict(trainer.settings),
        "config": trainer.model.config.to_diff_dict(),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "sha256": _digest(weights),
        "versions": {
            **{name: version(name) for name in ("icl_lib", "torch", "transformers", "safetensors")},
            "python": platform.python_version(),
        },
        "held_out": {str(rule): PAIRS[held].tolist() for rule, held in zip(RULES, HELD_OUT, strict=True)},
        "ambiguous": {str(examples): ambiguous(examples) for examples in (1, 2)},
        "accuracy": [measure(trainer.model, shown, query, count) for query in QUERIES for shown in MEASURED],
        "swapped": [measure_swapped(trainer.model, shown, count) for shown in MEASURED if shown > 1],
        "curve": trainer.curve,
    }
    (folder / f"{NAME}.json").write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    return record


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_hidden_rule(folder: str | Path = DATA, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load the trained model, in evaluation mode and without gradients.

    >>> from icl_lib.paper.hidden_rule.evaluation import replies
    >>> model = load_hidden_rule()
    >>> prompt = VOCABULARY.encode("2+3=10, 4+2=12, 1+5=12, 2+8=")
    >>> VOCABULARY.decode(replies(model, prompt[None]))
    '20'

    Args:
        folder: the folder of ``hidden_rule.safetensors`` and ``hidden_rule.json``; by default that of this package.
        dtype: the precision of the weights, which are stored in float32.

    Raises `ValueError` if a file is missing, or if the two do not belong together.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: give a floating-point dtype.")
    weights, record = (Path(folder) / f"{NAME}.{ending}" for ending in ("safetensors", "json"))
    for path in (weights, record):
        if not path.is_file():
            raise ValueError(f"folder has no {path.name}, {path.parent}: {REMEDY}")
    try:
        config, digest = (json.loads(record.read_text(encoding="utf-8"))[name] for name in ("config", "sha256"))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{record} is not the record of a trained model: {REMEDY}") from error
    if digest != _digest(weights):
        raise ValueError(f"{record} does not belong to {weights.name} in the same folder: {REMEDY}")
    try:
        from safetensors.torch import load_model
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ImportError("transformers is missing: pip install 'icl_lib[llm]'.") from None
    with torch.random.fork_rng(devices=[]):  # building the model draws initial weights
        model = LlamaForCausalLM(LlamaConfig(**config))
    load_model(model, str(weights))
    return model.to(dtype).requires_grad_(False).eval()


def export(folder: str | Path, model: nn.Module | None = None) -> Path:
    """Write the model and its tokenizer for `transformers`: config.json, model.safetensors, tokenizer.json.

    ``AutoModelForCausalLM.from_pretrained(folder)`` and ``AutoTokenizer.from_pretrained(folder)`` load them, and so
    does the command line::

        python -m icl_lib verify --model FOLDER --prompt "2+3=10, 4+2=12, 1+5=12, " --query "2+8="

    Args:
        folder: created if it is missing; otherwise it must be empty.
        model: by default the book's model.

    Raises `ValueError` for a folder that holds any file. From the shell:
    ``python -m icl_lib.paper.hidden_rule --export FOLDER``.
    """
    folder = Path(folder)
    require_free("folder", folder, remedy="")
    model = model or load_hidden_rule()
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bar:
            logging.enable_progress_bar()
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> Any:
    """Return the vocabulary as a tokenizer of `transformers`, which raises an error for any other symbol."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({token: index for index, token in enumerate(VOCABULARY.tokens)}))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[0-9]+|[^0-9]"), "isolated")]
    )
    words.decoder = decoders.Sequence([decoders.Replace(",", ", "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=words, clean_up_tokenization_spaces=False)
