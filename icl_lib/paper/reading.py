r"""How the blocks of a language model read a prompt, example by example: the steps of the edit, and the attention."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from icl_lib.low_rank import LowRank
from icl_lib.models.absorb import absorb


@dataclass(frozen=True, eq=False)
class ReadByExample:
    r"""Measurements after each example, at the last token of the query; made by :func:`read_by_example`.

    Attributes:
        steps: $\lVert W_i - W_{i-1} \rVert_F$ of the gate map in every block, ``[count, examples, blocks]``.
        newest: the attention to the newest example, ``[count, examples, blocks, heads]``.
        read: the attention to all examples so far, of the same shape.
        effective: how many examples a head reads, $1/\sum_j p_j^2$ for the shares $p_j$ of the examples in its
            attention to examples, of the same shape.
    """

    steps: Float[Tensor, "count examples blocks"]
    newest: Float[Tensor, "count examples blocks heads"]
    read: Float[Tensor, "count examples blocks heads"]
    effective: Float[Tensor, "count examples blocks heads"]

    @property
    def rates(self) -> Float[Tensor, "count examples blocks heads"]:
        """The share of the newest example in a head's attention to examples, $1/i$ where it attends to all alike."""
        return self.newest / self.read


@torch.no_grad()
def read_by_example(
    model: nn.Module, ids: Int[Tensor, "count tokens"], ends: Sequence[int], keep: int = 0
) -> ReadByExample:
    """Follow the edits and the attention of a language model while a prompt grows by one example at a time.

    The edit after $i$ examples replaces these examples for the query, as :func:`icl_lib.models.absorb.absorb` computes
    it. In the blocks after the first, the vector that the edit divides by changes with the examples too.

    Args:
        model: a model of transformers with one inner map, or the gate first; it is left as it was.
        ids: prompts, each with its query, whose examples end at the same places.
        ends: the number of tokens up to the end of each example. The query follows the last one.
        keep: the number of tokens at the beginning that belong to no example and stay in front of the query.

    >>> from icl_lib.paper.hidden_rule import load_hidden_rule, sample_prompts
    >>> prompts = sample_prompts(2, examples=3, seed=0)
    >>> found = read_by_example(load_hidden_rule(dtype=torch.float64), prompts.tokens, prompts.ends)
    >>> found.steps.shape, found.newest.shape
    (torch.Size([2, 3, 4]), torch.Size([2, 3, 4, 4]))
    """
    steps: list[Tensor] = []
    attention: list[Tensor] = []
    before: list[LowRank] | None = None
    lengths = [end - start for start, end in itertools.pairwise([keep, *ends])]
    for examples, end in enumerate(ends, 1):
        prompt = torch.cat([ids[:, :end], ids[:, ends[-1] :]], dim=1)
        edits = [next(iter(block.inner.values()))[:, -1] for block in absorb(model, prompt, end, keep=keep).blocks]
        moved = edits if before is None else [new - old for new, old in zip(edits, before, strict=True)]
        steps.append(torch.stack([step.norm() for step in moved], dim=-1))
        with _telling(model):
            weights = torch.stack(model(prompt, output_attentions=True).attentions, dim=1)[..., -1, keep:end]
        each = torch.stack([part.sum(-1) for part in weights.split(lengths[:examples], dim=-1)], dim=-1)
        total = each.sum(-1)
        attention.append(torch.stack([each[..., -1], total, total.square() / each.square().sum(-1)]))
        before = edits
    return ReadByExample(torch.stack(steps, dim=1), *torch.stack(attention, dim=2))


@contextlib.contextmanager
def _telling(model: nn.Module) -> Iterator[None]:
    """Let a model return what it attends to, which only one of its implementations of attention does."""
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
