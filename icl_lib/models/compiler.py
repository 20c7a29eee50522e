r"""Compile a prompt into weights: one edit of each map, fitted to many queries at once.

:func:`icl_lib.models.absorb.absorb` replaces a prompt for one query, exactly. Here the columns of $Z_0$ are what a
block reads for the tokens of *all* calibration queries, and those of $Z_C$ what it reads behind the prompt. Block by
block, with the edited blocks below, the edits are

$$\Delta V = V (Z_C - Z_0)\, Z_0^\top (Z_0 Z_0^\top + \lambda I)^{-1}, \qquad
  \Delta W_\text{down} = \Delta H\, Y^\top (Y Y^\top + \lambda I)^{-1} .$$

For $\lambda = 0$ and linearly independent columns they are the Moore–Penrose edits of
:func:`icl_lib.theorem.joint_weight_update`, exact on every calibration query; one query is the theorem. On other
queries the patch is a fit, and must be measured as one.

Source: the edit fitted to several queries is the *thought patch* of Mazzawi et al., *Transmuting prompts into weights*
(arXiv 2510.08734), there for one layer. Kept tokens, the edits of whole blocks and the ridge are this library's own.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.least_squares import require_rank, require_ridge
from icl_lib.measures import relative_error
from icl_lib.models.absorb import anatomy_of, outer_of, prompt_of
from icl_lib.models.activations import BlockActivations, CachedPrompt, Rows, joined, reads_of, with_context
from icl_lib.models.anatomy import Site, sites
from icl_lib.models.block_edits import BlockEdits, Fit, NotReproducedError
from icl_lib.models.block_patch import BlockPatch
from icl_lib.models.passes import bar_over, without_context
from icl_lib.models.patch import Patch
from icl_lib.models.prompt import Call, Prompt, experts_one_by_one
from icl_lib.models.report import TOLERANCE
from icl_lib.models.streams import Stream
from icl_lib.models.tokens import Tokens, behind_kept, cache_name, new_cache
from icl_lib.theorem import NoSingleEditError
from icl_lib.validation import require_size

TOKENS_AT_ONCE = 2048
"""The number of tokens, those of the prompt included, that one pass over calibration queries reads."""

HOW_TO_FIT = (
    "ridge=0 asks for one edit that is exact on every calibration query. Give fewer or shorter queries or a wider "
    "dtype, or fit the edit: ridge=1.0."
)


@dataclass(frozen=True)
class BlockFit:
    """How well the edits of one block serve the calibration queries.

    Attributes:
        conditions: of each map, by path, the condition number of what was inverted to find its edit; empty if the edits
            are exact.
        error: the relative error of the stream after the block, for each distinct token of the calibration queries.
    """

    conditions: dict[str, float]
    error: Tensor


@dataclass(frozen=True, eq=False)
class CompiledPatch(Patch):
    """One edit of each map in place of a prompt, for any query; made by :func:`compile_prompt`.

    It is used as a :class:`~icl_lib.models.patch.Patch` is, but :meth:`bare` takes the query alone. The edits are
    final: :meth:`~icl_lib.models.patch.Patch.merged` adds them to the weights as they are.

    Attributes:
        kept: the first tokens of the prompt, which stay in front of every query.
        start: the position of the query's first token in the bare call.
        queries: the number of calibration queries.
        ridge: the relative ridge of the fit, 0 for exact edits.
        fits: how well the edits of each block serve the calibration queries.
    """

    kept: Tensor
    start: int
    queries: int
    ridge: float
    fits: tuple[BlockFit, ...]

    def __repr__(self) -> str:
        block, replaced = self.blocks[0], self.context_length - self.keep
        return (
            f"CompiledPatch(replaces {replaced} token{'s' * (replaced > 1)} of a prompt"
            f"{f', behind {self.keep} kept' * bool(self.keep)}, {'exactly for' if self.is_exact else 'fitted to'} "
            f"{self.queries} quer{'y' if self.queries == 1 else 'ies'}, in {len(self.blocks)} "
            f"block{'s' * (len(self.blocks) > 1)}; {self.anatomy.blocks}[0]: {block._listed()}; {block.change.dtype} "
            f"on {block.change.device})"
        )

    @property
    def is_exact(self) -> bool:
        """Whether the edits are those of the theorem for all calibration queries, not a fit."""
        return not any(fit.conditions for fit in self.fits)

    def bare(self, query: Tensor) -> Call:
        """Return the call of the edited model for a query, without the prompt, behind the kept tokens.

        For token ids ``[*batch, m]`` it is ``model(**patch.bare(query))``, with ids, positions and a mask of ones
        ``[batch, keep + m]``; for a float stream ``[*batch, m, dim]`` it is ``model(patch.bare(query))``.
        """
        return _behind(self.kept, query, self.start, self.prompt)

    def joint(self, model: nn.Module, dense: bool = False) -> Patch:
        """Return the patch itself: each map has one edit already."""
        return self

    def singular_values(self) -> list[dict[str, Tensor]]:
        """Return the singular values of each edit, block by block and by path, largest first."""
        return [
            {path: edit.singular_values() for path, edit in block.edits.items() if not isinstance(edit, Tensor)}
            for block in self.blocks
        ]

    def _of_query(self) -> tuple[BlockPatch, ...]:
        return self.blocks

    def _use(self) -> str:
        kept = f"the tokens {self.kept.tolist()}" if self.kept.ndim == 1 else f"the {self.keep} kept vectors"
        behind = f"behind {kept}, which stay, " if self.keep else ""
        how = "exact on" if self.is_exact else "fitted to"
        return (
            f"It replaces {self.context_length - self.keep} tokens of a prompt for queries {behind}whose first token "
            f"has the position {self.start}. It is {how} {self.queries} queries. How well it serves others depends on "
            "the model and the queries: measure it."
        )


def compile_prompt(
    model: nn.Module,
    prompt: Tensor,
    queries: Sequence[Tensor],
    keep: int = 1,
    ridge: int | float = 1.0,
    rank: int | None = None,
    answers: Sequence[Tensor] | None = None,
    *,
    guard: Sequence[Tensor] | None = None,
    last: int | float = 2.0,
    start: int | None = None,
    outer: str | None = None,
    progress: bool = False,
) -> CompiledPatch:
    r"""Turn a prompt and a few queries into one low-rank edit of each map, in closed form.

    With the edits, the model is to answer *other* queries without the prompt as it answers them behind it. How well it
    does must be measured on queries that were not used here. No gradients are taken: the model runs over the prompt
    once, over the queries behind it, and over the queries alone, while the edits of each block are found.

    Args:
        model: any causal model with an :class:`~icl_lib.models.anatomy.Anatomy`; it is not changed.
        prompt: the token ids of the prompt, ``[n]``, or its float stream, ``[n, dim]``.
        queries: the calibration queries, ``[m_k]`` or ``[m_k, dim]``, of any lengths. Tokens with which several texts
            begin in common are one row, which counts as often as it occurs.
        keep: how many of the prompt's first tokens stay in front of every query. Trained language models need one.
            If the prompt begins with what stands in front of each question, such as a line break, keep that too. If
            queries begin with the first token of the prompt, as in chats, keep more than this token.
        ridge: $\rho$. In each map $\lambda = \rho \cdot \operatorname{median} \lVert r \rVert^2$ over what it reads;
            see :func:`icl_lib.least_squares.least_squares_edit`. 0 asks for edits that are exact on the calibration
            queries.
        rank: the largest rank of an edit; None for the rank of the fit, at most the number of distinct tokens.
        answers: for each query the ids that follow it. They are calibration tokens too, so that the patch also serves
            what is written after a query.
        guard: texts that have nothing to do with the prompt, as the model reads them. The edits should leave alone
            what each map reads for them, $g_j$, $j = 1 \dots n$: the fit to $m$ distinct tokens has the further term
            $\gamma \sum_j \lVert \Delta V g_j \rVert^2$ with $\gamma = 0.3\, m / n$. A few hundred tokens of any kind
            of text do; every token takes memory. The scale of a norm after the MLP is not guarded.
        last: how often the last token of each query counts, from which the answer is read; every other token counts
            once. It changes nothing where the edits are exact.
        start: the position of a query's first token without the prompt. By default it is the length of the prompt, its
            own position. ``start=keep`` is for models that will count their positions themselves, as ``generate`` does.
        outer: as for :func:`icl_lib.models.absorb.absorb`; only ``down`` serves several tokens in most blocks.
        progress: show a progress bar over the blocks.

    Raises `ValueError` for a model whose anatomy is not found, for a prompt or queries that it cannot read or that are
    too long, for no queries, for a ``keep`` beyond the prompt or behind which a query's first token is read as the kept
    ones, and with ``ridge=0`` for a guard, for the same text twice, or if no single edit is exact on all queries.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=16, blocks=3, heads=2, norm="pre")).double()
    >>> prompt, queries = torch.randn(9, 16).double(), list(torch.randn(4, 2, 16).double())
    >>> patch = compile_prompt(model, prompt, queries, ridge=0)
    >>> edited = patch.merged(model)
    >>> wanted = model(torch.cat([prompt, queries[3]]))[9:]
    >>> torch.allclose(edited(patch.bare(queries[3]))[1:], wanted, rtol=1e-9)
    True
    """
    texts = _texts(prompt, queries, answers)
    longest = max(range(len(texts)), key=lambda number: len(texts[number]))
    try:
        whole = prompt_of(model, torch.cat([prompt, texts[longest]]), len(prompt), "query", "query", True, None, keep)
    except ValueError as error:
        raise ValueError(f"prompt with queries[{longest}], the longest: {error}") from None
    for text in (*texts, *_guard(prompt, guard, ridge)):
        whole.check(model, text)
    require_ridge(ridge)
    require_rank(rank)
    if isinstance(last, bool) or not isinstance(last, int | float) or not 0 < last < float("inf"):
        raise ValueError(f"last is {last!r}: give a positive number, how often a query's last token counts.")
    start = len(prompt) if start is None else start
    require_size("start", start, keep)
    anatomy = anatomy_of(model, torch.cat([prompt, texts[longest]]))
    placed = sites(model, anatomy)
    outer = outer_of(placed, outer, whole, True, model)
    _require_causal(model, whole, prompt, texts[longest])
    _require_told_apart(model, placed, whole, prompt, texts, start)
    if ridge == 0:
        _require_distinct(texts)
    fit = None if ridge == 0 and rank is None else Fit(float(ridge), rank)
    blocks, fits = [], []
    passes = 2 + len(list(_batches(len(texts), len(prompt) + len(texts[longest]))))
    with bar_over(len(placed), passes, progress) as bar, experts_one_by_one(model):
        ends = [len(query) - 1 for query in queries]
        cached = _calibration(model, placed, whole, prompt, texts, ends, float(last), start, bar.update)
        if guard:
            calls = [text if isinstance(whole, Stream) else {"input_ids": text[None]} for text in guard]
            for block, reads in zip(cached.blocks, reads_of(model, placed, type(whole), calls), strict=True):
                block.guard.update(reads)

        def note(index: int, stream: Tensor, edits: BlockEdits) -> None:
            blocks.append(edits.patch())
            fits.append(BlockFit(edits.conditions, relative_error(stream, cached.blocks[index].output)))
            bar.update()

        try:
            without_context(model, placed, cached, outer, joint=True, fit=fit, keep=1, require=fit is None, visit=note)
        except (NoSingleEditError, NotReproducedError) as error:
            raise ValueError(f"{error} {HOW_TO_FIT}") from None
    return CompiledPatch(
        blocks=tuple(blocks),
        anatomy=anatomy,
        prompt=whole,
        outer_kind=outer,
        cached=None,
        is_joint=True,
        source=weakref.ref(model),
        kept=prompt[:keep].clone(),
        start=start,
        queries=len(queries),
        ridge=float(ridge),
        fits=tuple(fits),
    )


def _texts(prompt: Any, queries: Any, answers: Any) -> list[Tensor]:
    """Return each query with its answer, after checking that all are of the kind of the prompt."""
    if not isinstance(prompt, Tensor) or not 1 <= prompt.ndim <= 2 or not len(prompt):
        raise ValueError(
            f"prompt is {_told(prompt)}: give the token ids [n] of one prompt, or its float stream [n, dim], with at "
            "least one token."
        )
    named = {"queries": queries} | ({} if answers is None else {"answers": answers})
    for name, given in named.items():
        _require_texts(name, given, prompt)
    if answers is None:
        return list(queries)
    if len(answers) != len(queries):
        raise ValueError(f"answers are {len(answers)} and queries {len(queries)}: give one answer for each query.")
    return [torch.cat(pair) for pair in zip(queries, answers, strict=True)]


def _guard(prompt: Tensor, guard: Any, ridge: Any) -> list[Tensor]:
    if guard is None:
        return []
    _require_texts("guard", guard, prompt)
    if ridge == 0:
        raise ValueError("guard is given with ridge=0, for edits that are exact: give ridge=1.0, or no guard.")
    return list(guard)


def _require_texts(name: str, given: Any, prompt: Tensor) -> None:
    """Require a list of tensors like the prompt."""
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{name} is {_told(given)}: give a list of one or more tensors, each {_layout(prompt)}.")
    for number, text in enumerate(given):
        same = isinstance(text, Tensor) and (text.dtype, text.device) == (prompt.dtype, prompt.device)
        if not same or text.shape[1:] != prompt.shape[1:] or text.ndim != prompt.ndim or not len(text):
            raise ValueError(
                f"{name}[{number}] is {_told(text)}: give {_layout(prompt)} with at least one token, of the dtype "
                f"and on the device of the prompt, {prompt.dtype} on {prompt.device}."
            )


def _told(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype} on {value.device}"
    return f"a {type(value).__name__}" + (f" of length {len(value)}" if isinstance(value, (list, tuple)) else "")


def _layout(prompt: Tensor) -> str:
    return "[m]" if prompt.ndim == 1 else f"[m, {prompt.shape[1]}]"


def _require_distinct(texts: Sequence[Tensor]) -> None:
    """Require that no text occurs twice, for edits that are exact on each."""
    seen: dict[tuple[int, bytes], int] = {}
    for number, text in enumerate(texts):
        first = seen.setdefault((len(text), _bytes(text)), number)
        if first != number:
            raise ValueError(f"queries[{number}] is queries[{first}] again: remove one of them. {HOW_TO_FIT}")


def _require_causal(model: nn.Module, whole: Prompt, prompt: Tensor, text: Tensor) -> None:
    """Require that no token of a stream reads later ones: queries are padded, and share what they begin with."""
    if not isinstance(whole, Stream):
        return
    with torch.no_grad():
        short, long = (whole.run(model, inputs) for inputs in (prompt, torch.cat([prompt, text])))
    off = float(relative_error(long[: len(prompt)], short).max())
    if not off <= 1e-4:
        raise ValueError(
            f"model is a {type(model).__name__} in which tokens read those after them (the prompt's outputs change by "
            f"{off:.0e} with a query behind it): compile_prompt needs a causal model."
        )


def _require_told_apart(
    model: nn.Module, placed: Sequence[Site], whole: Prompt, prompt: Tensor, texts: Sequence[Tensor], start: int
) -> None:
    """Require that no query begins with a token that the model reads as the kept ones, once the prompt is gone.

    Attention over equal tokens outputs what it outputs for one of them. But this token needs an edit, and the kept ones
    must not change.
    """
    keep = whole.keep
    for number, text in enumerate(texts if keep else ()):
        others = (prompt != text[0]).reshape(len(prompt), -1).any(-1).nonzero().flatten().tolist()
        if others and others[0] >= keep:
            call, lead = _behind(prompt[:keep], text[:1], start, whole), torch.Size((1, keep + 1))
            [first, *_], _ = with_context(model, placed, type(whole), call, lead, keep=1)
            kept, token = first.output[0, 0], first.output[0, -1]
            if float(relative_error(token, kept)) <= TOLERANCE[kept.dtype]:
                raise ValueError(
                    f"keep is {keep}, and queries[{number}] begins with the kept token. Without the prompt the model "
                    "reads both alike, so no edit changes one and not the other. Keep more of the prompt: "
                    f"keep={others[0] + 1}."
                )
            return  # every other query of this kind begins with the same token


def _behind(kept: Tensor, query: Tensor, start: int, prompt: Prompt) -> Call:
    """Return the call for a query, or for several of one length, behind the kept tokens."""
    if isinstance(prompt, Stream):
        return torch.cat([kept.expand(*query.shape[:-2], *kept.shape), query], dim=-2)
    query = query.reshape(-1, query.shape[-1])
    ids = torch.cat([kept.expand(len(query), -1), query], dim=1)
    positions = torch.tensor([*range(len(kept)), *range(start, start + query.shape[1])], device=ids.device)
    return {name: part for name, part in behind_kept(ids, positions).items() if name in prompt.takes}


def _calibration(
    model: nn.Module,
    placed: Sequence[Site],
    whole: Prompt,
    prompt: Tensor,
    texts: Sequence[Tensor],
    ends: Sequence[int],
    last: float,
    start: int,
    visit: Callable[[], Any],
) -> CachedPrompt:
    """Return the bare call for all texts, padded on the right, and what the blocks read for them behind the prompt."""
    keep, width = whole.keep, max(map(len, texts))
    padded = torch.stack([torch.cat([text, text.new_zeros(width - len(text), *text.shape[1:])]) for text in texts])
    whole_texts = [torch.cat([prompt[:keep], text]) for text in texts]
    rows = _rows(whole_texts, [keep + end for end in ends], last, keep + width)
    owner, place = rows.tokens // (keep + width), rows.tokens % (keep + width) - keep
    kept, behind = _prompted(model, placed, whole, prompt, texts[0], visit)
    parts = [kept] if keep else []
    for batch in _batches(len(texts), len(prompt) + width):
        mine = (owner >= batch.start) & (owner < batch.stop) & (place >= 0)
        seen = behind(padded[batch])
        parts.append([_picked(block, (owner[mine] - batch.start) * width + place[mine]) for block in seen])
    blocks = tuple(joined(of_block) for of_block in zip(*parts, strict=True))
    lead = rows.tokens.shape
    return CachedPrompt(type(whole), _behind(prompt[:keep], padded, start, whole), lead, lead, blocks, None, rows)


def _batches(texts: int, tokens: int) -> Iterator[slice]:
    """Return the texts of each pass; each of them takes so many tokens."""
    size = max(1, TOKENS_AT_ONCE // tokens)
    return (slice(at, min(at + size, texts)) for at in range(0, texts, size))


def _rows(texts: Sequence[Tensor], ends: Sequence[int], last: float, width: int) -> Rows:
    """Number the distinct beginnings of texts that are padded to a width: a causal model reads the same for each.

    The token at the end of each query counts ``last`` times.
    """
    tokens: list[int] = []
    counts: list[float] = []
    known: dict[tuple[int, bytes], int] = {}
    of_token = torch.full((len(texts) * width,), -1)
    for number, text in enumerate(texts):
        row = -1
        for place, token in enumerate(text.cpu()):
            at = number * width + place
            row = known.setdefault((row, _bytes(token)), len(tokens))
            if row == len(tokens):
                tokens.append(at)
                counts.append(0.0)
                of_token[at] = row
            counts[row] += last if place == ends[number] else 1
    device = texts[0].device
    return Rows(*(one.to(device) for one in (torch.tensor(tokens), torch.tensor(counts), of_token)))


def _bytes(tokens: Tensor) -> bytes:
    return tokens.cpu().flatten().view(torch.uint8).numpy().tobytes()


def _prompted(
    model: nn.Module, placed: Sequence[Site], whole: Prompt, prompt: Tensor, text: Tensor, visit: Callable[[], Any]
) -> tuple[list[BlockActivations], Callable[[Tensor], tuple[BlockActivations, ...]]]:
    """Run the prompt once; return what its kept tokens read, and a function that runs queries behind it.

    The queries share the prompt's keys and values, if a trial with one of them, ``text``, shows that the model can.
    """
    call, shared = (prompt if isinstance(whole, Stream) else {"input_ids": prompt[None]}), _shared(model, whole, prompt)
    lead, places = torch.Size((1, whole.keep)), torch.arange(whole.keep, device=prompt.device)
    found, _ = with_context(model, placed, type(whole), call, lead, keep=1, visit=visit, places=places)
    kept = [_picked(block, places) for block in found]
    if shared is not None and not _answers_alike(model, prompt, text, shared):
        shared = None

    def behind(queries: Tensor) -> tuple[BlockActivations, ...]:
        call, options = _whole(whole, prompt, queries) if shared is None else shared(queries)
        return with_context(model, placed, type(whole), call, queries.shape[:2], keep=1, visit=visit, **options)[0]

    return kept, behind


def _whole(whole: Prompt, prompt: Tensor, queries: Tensor) -> tuple[Call, dict[str, Any]]:
    """Return the call for queries with the whole prompt in front of each."""
    texts = torch.cat([prompt.expand(len(queries), *prompt.shape), queries], dim=1)
    return texts if isinstance(whole, Stream) else {"input_ids": texts}, {}


def _shared(model: nn.Module, whole: Prompt, prompt: Tensor) -> Callable[[Tensor], tuple[Call, dict[str, Any]]] | None:
    """Run the prompt into a cache; return the call for queries behind it, None if the model has no such cache."""
    if not isinstance(whole, Tokens) or cache_name(model) not in whole.takes:
        return None
    name, cache = cache_name(model), new_cache(model)
    try:
        with torch.no_grad():
            Tokens.run(model, {"input_ids": prompt[None]}, 1, use_cache=True, **{name: cache})
    except Exception:  # whatever a model raises that wants a cache of another kind
        return None

    def call(queries: Tensor) -> tuple[Call, dict[str, Any]]:
        copied = copy.deepcopy(cache)
        copied.batch_repeat_interleave(len(queries))
        positions = torch.arange(len(prompt), len(prompt) + queries.shape[1], device=queries.device)
        ids = {"input_ids": queries, "position_ids": positions.expand(queries.shape)}
        return ids, {"use_cache": True, name: copied}

    return call


def _answers_alike(
    model: nn.Module, prompt: Tensor, text: Tensor, shared: Callable[[Tensor], tuple[Call, dict[str, Any]]]
) -> bool:
    """Return whether a text behind the cached prompt is answered as behind the prompt itself.

    Recurrent models have caches of other kinds, and a cache can be too short for the attention of its model.
    """
    with torch.no_grad():
        wanted = Tokens.run(model, {"input_ids": torch.cat([prompt, text])[None]}, 1)
        try:
            call, options = shared(text.expand(2, -1))
            answer = Tokens.run(model, call, 1, **options)
        except Exception:  # whatever a model raises that wants a cache of another kind
            return False
    limit = max(10 * TOLERANCE[wanted.dtype], TOLERANCE[torch.float32])  # some parts compute in float32
    return bool(relative_error(answer, wanted.expand_as(answer)).max() <= limit)


def _picked(block: BlockActivations, tokens: Tensor) -> BlockActivations:
    """Return the activations at some tokens, ``[tokens, width]``; maps that share what they read still do."""
    picked: dict[int, Tensor] = {}

    def at(activation: Tensor) -> Tensor:
        if id(activation) not in picked:
            picked[id(activation)] = activation.flatten(0, -2)[tokens]
        return picked[id(activation)]

    return BlockActivations(at(block.stream), {path: at(read) for path, read in block.reads.items()}, at(block.output))
