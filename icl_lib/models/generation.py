"""Text written by a model that reads one token at a time: new edits replace the text before each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.measures import relative_error
from icl_lib.models.absorb import anatomy_of, outer_of
from icl_lib.models.activations import CachedPrompt, joined, with_context
from icl_lib.models.anatomy import sites
from icl_lib.models.passes import without_context
from icl_lib.models.prompt import accepted, experts_one_by_one
from icl_lib.models.tokens import Tokens, behind_kept, cache_name, new_cache
from icl_lib.validation import require_size


@dataclass(frozen=True, eq=False)
class Agreement:
    """The result of :func:`greedy_agreement`; tokens are ``[batch, new]``.

    Attributes:
        tokens: chosen by the edited model, which reads the current token at its own position, behind the kept ones.
        with_context: chosen by the model itself at the same places, with the whole text in its cache. As long as the
            two agree, this is the ordinary greedy generation of the model.
        without_context: chosen by the model on the same tokens, without edits.
        error: the largest relative error of the logits of the edited model.
    """

    tokens: Tensor
    with_context: Tensor
    without_context: Tensor
    error: float

    @property
    def share(self) -> float:
        """The share of tokens on which the edited model and the model with the text agree."""
        return (self.tokens == self.with_context).double().mean().item()

    @property
    def control(self) -> float:
        """The same share for the model without edits."""
        return (self.without_context == self.with_context).double().mean().item()


def greedy_agreement(
    model: nn.Module,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    outer: str | None = None,
    progress: bool = False,
    keep: int = 0,
) -> Agreement:
    """Compare greedy generation by an edited model that reads only the current token with that of the model itself.

    The protocol of Goldwaser et al. (arXiv 2511.17864). At every step the model reads the current token, with the text
    before it in its key-value cache, and the edits that replace this text are computed. The edited model reads the
    current token at its position, alone or behind the first ``keep`` tokens, and chooses the next token. Both go on
    with that token.

    Args:
        model: a causal language model with an anatomy; it is not changed.
        input_ids: prompts of one length, ``[*batch, n]``.
        max_new_tokens: the number of tokens to write after each prompt; there is no early stop.
        outer: as for :func:`icl_lib.models.absorb.absorb`.
        progress: show a progress bar over tokens.
        keep: how many of the first tokens stay in front of the current one, with the edits and without.

    Raises `ValueError` as :func:`icl_lib.models.absorb.absorb` does.
    """
    if not isinstance(input_ids, Tensor):
        raise ValueError(f"input_ids is a {type(input_ids).__name__}: give a tensor of token ids [*batch, n].")
    require_size("max_new_tokens", max_new_tokens)
    if cache_name(model) not in accepted(model):
        raise ValueError(
            f"the forward pass of {type(model).__name__} takes no key-value cache, in which the earlier text is kept: "
            "give a model of Hugging Face with past_key_values."
        )
    length = input_ids.shape[-1] if input_ids.ndim else 0
    prompt = Tokens(model, input_ids, length - 1, keep=keep)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if longest is not None and length + max_new_tokens > longest:
        raise ValueError(
            f"{length} tokens and {max_new_tokens} new ones need more positions than the {longest} of this model: "
            "lower max_new_tokens."
        )
    placed = sites(model, anatomy_of(model))
    outer = outer_of(placed, outer, prompt, False, model)
    ids = input_ids.reshape(-1, length)
    options = {"use_cache": True, cache_name(model): new_cache(model)}
    steps = tqdm(range(max_new_tokens), unit="token", disable=not progress or building_book(), leave=False)
    one, both = torch.Size((len(ids), 1)), torch.Size((len(ids), keep + 1))
    places = torch.arange(keep, device=ids.device)
    chosen: list[tuple[Tensor, Tensor, Tensor]] = []
    errors = []
    with experts_one_by_one(model), torch.no_grad():
        start = {name: part[:, :-1] for name, part in prompt.whole(ids).items()}
        kept, _ = with_context(
            model, placed, Tokens, start, torch.Size((len(ids), keep)), keep=1, places=places, **options
        )
        current = ids[:, -1:]
        for step in steps:
            position = length - 1 + step
            call = {"input_ids": current, "position_ids": torch.full_like(current, position)}
            seen, wanted = with_context(model, placed, Tokens, call, one, keep=1, **options)
            if keep:
                call = behind_kept(
                    torch.cat([ids[:, :keep], current], -1), torch.cat([places, places.new_tensor([position])])
                )
            bare = Tokens.run(model, call, keep=1)
            blocks = tuple(joined(parts) for parts in zip(kept, seen, strict=True))
            cached = CachedPrompt(Tokens, call, both, both, blocks, wanted[:, -1])
            edited = without_context(model, placed, cached, outer, keep=1, require=False)
            chosen.append(tuple(logits[:, -1].argmax(-1) for logits in (edited, wanted, bare)))
            errors.append(relative_error(edited, wanted).max().item())
            current = chosen[-1][0][:, None]
    return Agreement(*(torch.stack(part, -1) for part in zip(*chosen, strict=True)), max(errors))
