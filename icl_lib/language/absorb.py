"""Compute the edits of a language model that replace the first tokens of a prompt."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from icl_lib.language.call import accepted, bare_call, experts_one_by_one, full_call
from icl_lib.language.finder import Reading
from icl_lib.language.passes import Prompted, bar_over, with_context, without_context
from icl_lib.language.patch import LanguagePatch
from icl_lib.models.anatomy import anatomy_of


def absorb_tokens(
    model: nn.Module,
    ids: Tensor,
    context_length: int,
    reference: str,
    positions: str | None,
    outer: str | None,
    joint: bool,
    progress: bool,
) -> LanguagePatch:
    """Do what :func:`icl_lib.absorb.absorb` does, for token ids ``[*batch, n]``."""
    anatomy, first = anatomy_of(model), first_token(context_length, reference, positions)
    outer = outer or anatomy.outer_choices[0]
    with bar_over(len(model.get_submodule(anatomy.blocks)), 2, progress) as bar, experts_one_by_one(model, anatomy):
        readings, _ = with_context(model, full_call(ids), first, keep=1, visit=bar.update)
        prompted = prompted_by(model, ids, context_length, reference, first, readings)
        blocks, _ = without_context(model, prompted, outer, joint, keep=1, visit=lambda *_: bar.update())
    return LanguagePatch(blocks, anatomy, reference, first, context_length, outer, prompted, joint, weakref.ref(model))


def first_token(context_length: int, reference: str, positions: str | None) -> int:
    """Return the first position that gets an edit."""
    return 0 if reference == "self" and positions != "query" else context_length


def prompted_by(
    model: nn.Module, ids: Tensor, context_length: int, reference: str, first: int, readings: tuple[Reading, ...]
) -> Prompted:
    """Return the query that remains of these ids, with what the blocks read at its positions with the context."""
    bare = bare_call(ids, context_length, reference, first)
    bare = {name: part for name, part in bare.items() if name in accepted(model)}
    return Prompted(bare, torch.Size((*ids.shape[:-1], ids.shape[-1] - first)), readings)
