"""What compiled prompts are compared with: a vector added in each block, edits of the last maps alone, distillation.

Each is a context manager. It gives the model with the prompt in it, and leaves the model that it was given as it was.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from icl_lib.environment import extra
from icl_lib.least_squares import least_squares_edit
from icl_lib.models.absorb import anatomy_of
from icl_lib.models.activations import on_input, on_output
from icl_lib.models.anatomy import sites
from icl_lib.models.tokens import behind_kept, cache_name, new_cache

Edited = contextlib.AbstractContextManager[nn.Module]


def padded(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Texts side by side, with zeros behind them, ``[texts, longest]``, and the number of tokens of each.

    >>> padded([torch.tensor([5, 6]), torch.tensor([7])])
    (tensor([[5, 6],
            [7, 0]]), tensor([2, 1]))
    """
    ids = nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    return ids, torch.tensor([len(text) for text in texts])


def behind_prompt(model: nn.Module, prompt: Tensor, queries: Sequence[Tensor], last: int = 1) -> Tensor:
    """The logits at the ``last`` tokens of each query behind the prompt, ``[queries · last, vocabulary]``."""
    ids, lengths = padded(queries)
    cache, name = new_cache(model), cache_name(model)
    with torch.no_grad():
        model(input_ids=prompt[None], use_cache=True, **{name: cache})
        cache.batch_repeat_interleave(len(ids))
        positions = torch.arange(len(prompt), len(prompt) + ids.shape[1]).expand(ids.shape)
        logits = model(input_ids=ids, position_ids=positions, use_cache=True, **{name: cache}).logits
    return _at_the_end(logits, lengths, last)


def _at_the_end(logits: Tensor, lengths: Tensor, last: int) -> Tensor:
    places = lengths[:, None] + torch.arange(-last, 0)
    return logits[torch.arange(len(logits))[:, None], places].flatten(0, 1)


def without_prompt(model: nn.Module, prompt: Tensor, queries: Sequence[Tensor], keep: int, last: int = 1) -> Tensor:
    """The same without the prompt: behind its first ``keep`` tokens alone, at the positions behind the prompt."""
    ids, lengths = padded([torch.cat([prompt[:keep], query]) for query in queries])
    positions = torch.tensor([*range(keep), *range(len(prompt), len(prompt) + ids.shape[1] - keep)])
    logits = model(**behind_kept(ids, positions), use_cache=False).logits
    return _at_the_end(logits, lengths, last)


def write(ask: Callable[[Sequence[Tensor]], Tensor], queries: Sequence[Tensor], length: int) -> list[Tensor]:
    """The tokens that are written after each query, the likeliest each time; ``ask`` gives the logits after texts."""
    texts = list(queries)
    for _ in range(length):
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, ask(texts).argmax(-1), strict=True)]
    return [text[len(query) :] for text, query in zip(texts, queries, strict=True)]


def replies(model: nn.Module, prompt: Tensor, queries: Sequence[Tensor], length: int) -> list[Tensor]:
    """The same for the model behind the prompt."""
    return write(lambda texts: behind_prompt(model, prompt, texts), queries, length)


def _outputs(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Tensor]) -> list[Tensor]:
    """What each block outputs in a run; for a prompt read in two parts, in the second."""
    found: list[Tensor] = [torch.empty(0)] * len(blocks)
    with contextlib.ExitStack() as stack:
        for number, block in enumerate(blocks):
            on_output(stack, block, lambda output, number=number: found.__setitem__(number, output))
        run()
    return found


@contextlib.contextmanager
def corrected(
    model: nn.Module, prompt: Tensor, queries: Sequence[Tensor], keep: int, ridge: float | None = None
) -> Iterator[nn.Module]:
    r"""Add to the output of each block what the prompt adds to it, as far as one vector or one edit can.

    Without a ridge it is a vector: the mean over the tokens of the calibration queries of what the block, with the
    blocks before it corrected, still lacks. This is a steering vector in every block, added at every token that is
    not kept. With a ridge it is an edit of the last map of the MLP, fitted as
    :func:`~icl_lib.models.compiler.compile_prompt` fits it, while the first maps stay as they are.
    """
    placed = sites(model, anatomy_of(model))
    blocks = [site.block for site in placed]
    wanted = _outputs(model, blocks, lambda: behind_prompt(model, prompt, queries))
    _, lengths = padded(queries)
    used = torch.arange(wanted[0].shape[1]) < lengths[:, None]
    changes: list[Callable[[Tensor, Tensor], Tensor] | None] = [None] * len(blocks)
    reads: list[Tensor] = [torch.empty(0)] * len(blocks)

    def fitted(number: int, output: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        missing = wanted[number][used] - output[:, keep:][used]
        if ridge is None:
            vector = missing.mean(0)
            return lambda _, output: torch.cat([output[:, :keep], output[:, keep:] + vector], dim=1)
        kept, rows = reads[number][0, :keep], reads[number][:, keep:][used]
        both, counts = torch.cat([kept, rows]), torch.tensor([len(queries)] * keep + [1] * len(rows))
        lam = ridge * both.square().sum(-1).median().item()
        zero = missing.new_zeros(keep, missing.shape[1])
        edit = least_squares_edit(both, torch.cat([zero, missing]), lam, counts.to(both.dtype))
        return lambda read, output: output + edit.matvec(read)

    def change(number: int, output: Tensor) -> Tensor:
        if changes[number] is None:
            changes[number] = fitted(number, output)
        return changes[number](reads[number], output)

    with contextlib.ExitStack() as stack:
        for number, site in enumerate(placed):
            last = site.block.get_submodule(site.anatomy.outer)
            on_input(stack, last, lambda read, number=number: reads.__setitem__(number, read))
            on_output(stack, site.block, lambda output, number=number: change(number, output))
        with torch.no_grad():
            without_prompt(model, prompt, queries, keep)
        yield model


@contextlib.contextmanager
def distilled(
    model: nn.Module,
    prompt: Tensor,
    queries: Sequence[Tensor],
    keep: int,
    steps: int,
    rate: float,
    seed: int = 0,
    rank: int = 16,
    batch: int = 8,
    last: int = 1,
) -> Iterator[nn.Module]:
    """Train an adapter of all maps of the MLPs until the model answers without the prompt as it answers with it.

    Context distillation: Adam on the divergence of the answers' distributions at the ``last`` tokens of each query. The
    queries are those that a prompt is compiled on, drawn again and again; no answer is given.
    """
    with extra("llm"):
        import peft
    anatomy = anatomy_of(model)
    target = behind_prompt(model, prompt, queries, last).log_softmax(-1).unflatten(0, (-1, last))
    names = sorted({path.rsplit(".", 1)[-1] for path in (*anatomy.inner, anatomy.outer)})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about a name that PEFT uses
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names)
        student = peft.get_peft_model(copy.deepcopy(model), config).eval()
    optimiser = torch.optim.Adam([part for part in student.parameters() if part.requires_grad], rate)
    drawn = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            chosen = torch.randperm(len(queries), generator=drawn)[:batch].tolist()
            texts = [queries[number] for number in chosen]
            answer = without_prompt(student, prompt, texts, keep, last).log_softmax(-1)
            wanted = target[chosen].flatten(0, 1)
            loss = nn.functional.kl_div(answer, wanted, reduction="batchmean", log_target=True)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    yield student.requires_grad_(False)
