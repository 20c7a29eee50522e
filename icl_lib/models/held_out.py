r"""How well an edited model stands in for the prompted one on queries that the edit was not made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from icl_lib.models.compiler import CompiledPatch


@dataclass(frozen=True)
class HeldOut:
    r"""The measurements of :func:`held_out`, on the token after each query.

    Attributes:
        queries: how many were asked.
        kl: of the bare and of the edited model, the mean divergence $\operatorname{KL}(p_C \,\|\, p)$ from the
            distribution $p_C$ with the prompt, in nats.
        agreement: of the same, the share of queries whose likeliest token is that with the prompt.
        accuracy: of the same and of the ``prompted`` model, the share whose likeliest token is the first of the right
            answer; empty without answers.
    """

    queries: int
    kl: dict[str, float]
    agreement: dict[str, float]
    accuracy: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return all measurements as plain numbers and dictionaries."""
        return asdict(self)

    def _table(self, form: str) -> str:
        runs = {"with the prompt": "prompted", "edited": "edited", "bare": "bare"}
        rows = [
            {
                "model": name,
                "KL": self.kl.get(run, 0.0),
                "agrees": f"{self.agreement.get(run, 1.0):.0%}",
                **({"right": f"{self.accuracy[run]:.0%}"} if self.accuracy else {}),
            }
            for name, run in runs.items()
        ]
        return tabulate(rows, headers="keys", tablefmt=form, floatfmt=".3f")

    def __str__(self) -> str:
        return f"{self.queries} held-out queries, next token\n\n{self._table('simple')}"

    def _repr_html_(self) -> str:
        return f"<p>{self.queries} held-out queries, next token</p>{self._table('html')}"


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    r"""The divergence of a next token's distribution from the wanted one, in nats.

    $$\operatorname{KL}(p \,\|\, q) = \sum_i p_i (\log p_i - \log q_i)$$

    Shapes: ``wanted`` ($\log p$) and ``found`` ($\log q$) ``[*batch, vocabulary]``; the result is ``[*batch]``.

    >>> even, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    >>> divergence(sure, even), divergence(even, even)
    (tensor(0.3681), tensor(0.))
    """
    return (wanted.exp() * (wanted - found)).sum(-1)


@torch.no_grad()
def held_out(
    patch: CompiledPatch,
    model: nn.Module,
    prompt: Tensor,
    queries: Sequence[Tensor],
    answers: Sequence[Tensor] | None = None,
) -> HeldOut:
    """Ask queries of the prompted, the bare and the edited model, and compare the next token.

    The control is the bare model: it reads the query behind the kept tokens, as the edited one does, without the edits.

    Args:
        patch: made by :func:`icl_lib.models.compiler.compile_prompt` from the model and the prompt.
        model: the language model; it is not changed.
        prompt: token ids, ``[n]``.
        queries: token ids, ``[m_k]``, that the patch was not made from.
        answers: the right answers to the queries, token ids; the first token of each counts.

    Raises `ValueError` for a float stream, for no queries, and for another number of answers.
    """
    if prompt.is_floating_point():
        raise ValueError(f"prompt has dtype {prompt.dtype}: held_out compares the next tokens, so give token ids.")
    if not queries:
        raise ValueError("queries are empty: give one or more queries that the patch was not made from.")
    if answers is not None and len(answers) != len(queries):
        raise ValueError(f"answers are {len(answers)} and queries {len(queries)}: give one answer for each query.")

    def said(calls: Sequence[Any]) -> Tensor:
        logits = [patch.prompt.run(model, call, keep=1)[0, -1] for call in calls]
        return torch.stack(logits).double().log_softmax(-1)

    bare = [patch.bare(query) for query in queries]
    found = {"prompted": said([{"input_ids": torch.cat([prompt, query])[None]} for query in queries])}
    found["bare"] = said(bare)
    with patch.applied(model):
        found["edited"] = said(bare)
    wanted = found["prompted"]
    return HeldOut(
        queries=len(queries),
        kl={name: divergence(wanted, found[name]).mean().item() for name in ("bare", "edited")},
        agreement={name: _share(found[name], wanted.argmax(-1)) for name in ("bare", "edited")},
        accuracy={}
        if answers is None
        else {name: _share(one, torch.stack([answer[0] for answer in answers])) for name, one in found.items()},
    )


def _share(said: Tensor, right: Tensor) -> float:
    return (said.argmax(-1) == right.to(said.device)).double().mean().item()
