"""Models and prompts that the tests of language models share, and how to tell whether a model was changed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.paper.experiments.language import VOCABULARY, small_language_model

LENGTH = 64
MIXTURES = ("Mixtral", "Qwen 3 MoE")


@functools.cache
def shared(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One model of this architecture for all tests; none may change it."""
    return small_language_model(name, dtype)


def prompts(*batch: int, length: int = LENGTH) -> Tensor:
    """Token ids, none of which occurs twice in a prompt."""
    rows = [torch.randperm(VOCABULARY)[:length] for _ in range(torch.Size(batch).numel())]
    return torch.stack(rows).reshape(*batch, length)


def state(model: nn.Module) -> tuple[list[int], list[str], dict[str, Tensor]]:
    """Hooks, what shadows a parameter, and every number, to be compared afterwards."""
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    shadows = [name for part in model.modules() for name in part._parameters if name in vars(part)]
    return hooks, shadows, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(before: Any, after: Any) -> bool:
    """Whether two states are equal bit for bit."""
    return before[:2] == after[:2] and all(torch.equal(before[2][name], after[2][name]) for name in before[2])
