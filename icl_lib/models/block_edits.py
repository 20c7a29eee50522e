r"""Compute the edits of one block during its forward pass.

Each edit is computed when its weight is used, from the input of the weight then and from what the block read with the
context. The edit is applied at once, so everything after it in the block reads the output of the edited weight.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.least_squares import LeastSquares
from icl_lib.low_rank import LowRank
from icl_lib.models.activations import BlockActivations, CachedPrompt, on_stream, same_memory
from icl_lib.models.anatomy import Site, factor_at, is_experts
from icl_lib.models.block_patch import BlockPatch
from icl_lib.models.edited_weights import (
    NormParts,
    Product,
    edited,
    edited_norm,
    holder_of,
    parameter_at,
    parts_of,
    split,
)
from icl_lib.output_updates import output_update, scale_update, turning_update
from icl_lib.theorem import NoSingleEditError, joint_weight_update, least_norm_edit, weight_update


class NotReproducedError(ValueError):
    """A block whose output with its edits is not that with the prompt, or whose anatomy cannot be right."""


GUARD = 0.3
"""How much all reads of a guard count together, for each read that is fitted."""


@dataclass(frozen=True)
class Fit:
    r"""How one edit of each map is fitted to more tokens than it need serve exactly.

    Attributes:
        ridge: $\rho$; a map that reads $r_k$ is fitted with $\lambda = \rho \operatorname{median}_k \lVert r_k
            \rVert^2$ in :func:`icl_lib.least_squares.least_squares_edit`.
        rank: the largest rank of an edit, or None.
    """

    ridge: float
    rank: int | None = None

    def of(self, reads: Tensor, counts: Tensor, guard: Tensor | None = None) -> LeastSquares:
        """Return the regression from these reads, ``[rows, in]``, with a guard ``[tokens, in]``."""
        scale = reads.double().square().sum(-1).median().item()
        if guard is not None:
            guard = guard.double() * (GUARD * len(reads) / len(guard)) ** 0.5
        return LeastSquares(reads, self.ridge * scale, counts, guard)


class BlockEdits:
    """Computes the edits of one block.

    Args:
        site: the block, its name in error messages and the places of its parts.
        prompt: the prompt, with the leading dimensions of the edits and of the query.
        activations: what the block read with the context.
        outer: which weights add the change of the stream: ``down``, ``bias`` or ``scale``.
        joint: whether one edit of each map must serve all tokens.
        dense: whether the block runs with the edited matrices themselves, as a merged model does.
        fit: for joint edits, how they are fitted; None for exact ones.
    """

    def __init__(
        self,
        site: Site,
        prompt: CachedPrompt,
        activations: BlockActivations,
        outer: str,
        joint: bool = False,
        dense: bool = False,
        fit: Fit | None = None,
    ) -> None:
        self.where, self.block, self.anatomy = site
        self.prompt, self.activations = prompt, activations
        self.kind, self.joint, self.dense, self.fit = outer, joint, dense, fit
        self.norm = self.block.get_submodule(self.anatomy.scale) if self.anatomy.scale else None
        self.dtypes: set[torch.dtype] = set()  # those in which the edited maps compute
        self.forget()

    def forget(self) -> None:
        """Release the edits and everything that was kept to compute them."""
        self.inner: dict[str, LowRank] = {}
        self.outer: dict[str, LowRank | Tensor] = {}
        self.transposed: set[str] = set()
        # Set in this order during the pass: h_C - h_0; the tokens of each expert, in the order in which it reads them;
        # the sum of the gates of each token; the wanted output of the norm after the MLP, and its new scale.
        self.change: Tensor | None = None
        self.sent: dict[int, Tensor] = {}
        self.gates: Tensor | None = None
        self.turned: tuple[Tensor, Tensor] | None = None
        # The condition number of each fit; what was fitted last, which maps that read the same share.
        self.conditions: dict[str, float] = {}
        self.fitted: tuple[Tensor, LeastSquares] | None = None

    def install(self, stack: contextlib.ExitStack) -> None:
        """Make the block run with its edits until the stack is closed."""
        block, here = self.block, self.anatomy
        on_stream(stack, block, here, self._on_stream)
        maps = {path: self._on_read for path in here.inner}
        by_norm = self.norm is not None and self.kind != "down"
        if here.outer and not by_norm:
            maps[here.outer] = self._on_hidden
        for mixture in {holder_of(block, path)[0] for path in maps if is_experts(block, path)}:
            hook = mixture.register_forward_pre_hook(self._on_routed, with_kwargs=True)
            stack.callback(hook.remove)
        for path, edit in maps.items():
            if is_experts(block, path):
                edit = self._on_expert_read if edit == self._on_read else self._on_expert_hidden
            stack.enter_context(edited(self.where, block, path, functools.partial(edit, path), self.dense))
        if self.norm is not None:
            of_bias = self.kind == "bias"
            edit = self._on_biased_norm if of_bias else self._on_norm
            stack.enter_context(edited_norm(self.where, block, here.scale, edit, of_bias))

    def require_complete(self) -> None:
        """Raise `ValueError` unless every map of the anatomy was called."""
        called = {split(path)[0] for path in (*self.inner, *self.outer)}
        outer = self.anatomy.outer if self.norm is None or self.kind == "down" else None
        missing = {path for path in (*self.anatomy.inner, outer) if path} - called
        if missing:
            raise ValueError(
                f"{self.where}.{min(missing)} is never called without the context: correct the entry, see "
                "icl_lib.Anatomy."
            )

    def patch(self) -> BlockPatch:
        """Return the edits."""
        sent = {} if self.joint else self.sent
        return BlockPatch(self.inner, self.outer, self.change, sent, frozenset(self.transposed), self.kind)

    def _on_stream(self, tokens: Tensor) -> None:
        self.change = self.activations.stream - self.prompt.of(tokens)

    @property
    def _needed(self) -> Tensor:
        r"""The change of the MLP's output, $s \Delta h / m$."""
        here = self.anatomy
        if (here.multiplier, here.skip_multiplier) == (1.0, 1.0):
            return self.change
        factor = factor_at(self.block, here.skip_multiplier) / factor_at(self.block, here.multiplier)
        return self.change * factor

    def _on_read(self, path: str, product: Product) -> LowRank:
        return self._inner(path, product, self.prompt.of(product.read), self.activations.reads[path])

    def _on_routed(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        if len(given) < 3 or any(not isinstance(part, Tensor) or part.ndim != 2 for part in given[1:3]):
            raise ValueError(
                f"{self.where}: the module of the experts is called with {len(given)} arguments: only those called as "
                "experts(z, chosen, gates), the last two [tokens, active experts], are covered, see icl_lib.Anatomy."
            )
        chosen, gates = given[1:3]
        self.gates = gates.to(self.change.dtype).sum(-1, keepdim=True)
        self.sent = {expert: (chosen == expert).T.nonzero()[:, 1] for expert in chosen.unique().tolist()}

    def _of_expert(self, expert: int, read: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what an expert reads of the tokens that get an edit, their numbers, and those of their edits."""
        tokens = self.sent[expert]
        if self.prompt.rows is None:
            return read, tokens, tokens
        rows = self.prompt.rows.of_token[tokens]
        used = rows >= 0
        return read[used], tokens[used], rows[used]

    def _on_expert_read(self, path: str, expert: int, product: Product) -> LowRank | None:
        read, _, rows = self._of_expert(expert, product.read)
        if not len(rows):  # only padding is sent to this expert
            return None
        wanted = self.activations.reads[path].flatten(0, -2)[rows]
        return self._inner(f"{path}[{expert}]", product, read, wanted, rows)

    def _on_expert_hidden(self, path: str, expert: int, product: Product) -> LowRank | None:
        read, tokens, rows = self._of_expert(expert, product.read)
        if not len(rows):
            return None
        change = self._needed.flatten(0, -2)[rows] / self.gates[tokens]
        return self._outer(f"{path}[{expert}]", product, change, read, rows)

    def _on_hidden(self, path: str, product: Product) -> LowRank | Tensor:
        self._note(path, product)
        change = self._needed
        if self.kind == "bias":
            self.outer[path] = self._one_vector(path, change)
            return self.outer[path]
        hidden = self.prompt.of(product.read)
        if self.norm is not None:
            change = self._turned(path, change, self.prompt.of(product.output))
        return self._outer(path, product, change, hidden)

    def _turned(self, path: str, change: Tensor, output: Tensor) -> Tensor:
        """Return the change of the norm's input that, with a new scale, changes the norm's output by ``change``."""
        parts = parts_of(self.norm, output)
        wanted = parts.output + change
        flat = tuple(vectors.flatten(0, -2) for vectors in (wanted, output, parts.normed))
        if self.fit is not None:  # the direction alone; the scale is fitted to what comes of it
            turn, _ = self._named(path, turning_update, *flat, parts.scale)
            return turn
        shared = self.joint and output[..., 0].numel() > 1
        turn, scale = self._named(path, turning_update, *flat, parts.scale, shared)
        self.turned = wanted, scale if scale.ndim == 1 else scale.reshape(output.shape)
        return turn.reshape(output.shape)

    def _on_biased_norm(self, _: Tensor) -> Tensor:
        path = f"{self.anatomy.scale}.bias"
        self.outer[path] = self._one_vector(path, self._needed)
        return self.outer[path]

    def _on_norm(self, read: Tensor) -> Tensor:
        path = self.anatomy.scale
        parts = parts_of(self.norm, self.prompt.of(read))
        if self.fit is not None:
            wanted = self._needed + parts.output
            edit = _fitted_scale(parts, wanted, self.prompt.rows.counts, self.fit.ridge)
        elif self.turned is None:  # the scale alone takes the change and the rounding of the norm
            rest = self._needed + parts.output - parts.scale * parts.normed
            edit = self._named(path, scale_update, rest, parts.normed)
        else:
            wanted, scale = self.turned
            if scale.ndim > 1:
                # Turning leaves rounding errors, among them those of a norm that computes in float32.
                exact = wanted / parts.normed
                scale = torch.where((exact - scale).abs() < scale.abs() / 2, exact, scale)
            edit = scale - parts.scale
        self.outer[path] = self._one_vector(path, edit)
        return self.outer[path]

    def _inner(self, path: str, product: Product, read: Tensor, wanted: Tensor, rows: Tensor | None = None) -> LowRank:
        weight = self._cast(path, product.weight)
        if self.fit is not None:
            edit = self._fitted(path, product, read, (wanted - read).to(weight.dtype) @ weight.mT, rows)
        else:
            formula = functools.partial(joint_weight_update if self.joint else weight_update, weight)
            edit = self._matrix_edit(path, product, formula, read, wanted)
        self.inner[path] = edit
        return edit

    def _outer(
        self, path: str, product: Product, change: Tensor, hidden: Tensor, rows: Tensor | None = None
    ) -> LowRank:
        if self.fit is not None:
            edit = self._fitted(path, product, hidden, change, rows)
        else:
            arguments = (least_norm_edit, hidden, change) if self.joint else (output_update, change, hidden)
            edit = self._matrix_edit(path, product, *arguments)
        self.outer[path] = edit
        return edit

    def _fitted(self, path: str, product: Product, read: Tensor, change: Tensor, rows: Tensor | None) -> LowRank:
        """Return the edit of a map that is fitted to some rows, or to all; maps that read the same share the work."""
        self._note(path, product)
        read, counts = self._cast(path, read), self.prompt.rows.counts
        guard = self.activations.guard.get(path)
        if rows is not None:
            solver = self.fit.of(read, counts[rows], guard)
        elif self.fitted is not None and same_memory(self.fitted[0], product.read):
            solver = self.fitted[1]
        else:
            solver = self.fit.of(read, counts, guard)
            self.fitted = product.read, solver
        self.conditions[path] = solver.condition
        return solver.edit(self._cast(path, change), self.fit.rank)

    def _matrix_edit(self, path: str, product: Product, formula: Callable[..., LowRank], *vectors: Tensor) -> LowRank:
        self._note(path, product)
        vectors = tuple(self._cast(path, vector.flatten(0, -2) if self.joint else vector) for vector in vectors)
        return self._named(path, formula, *vectors)

    def _note(self, path: str, product: Product) -> None:
        if self.change is None:
            raise NotReproducedError(f"{self.where}.{path} is called before {self.where}.{self.anatomy.stream}.")
        self.dtypes.add(product.output.dtype)
        if product.transposed:
            self.transposed.add(split(path)[0])

    def _cast(self, path: str, tensor: Tensor) -> Tensor:
        """Return the tensor in the dtype of the parameter, in which its edit is, whatever the product's dtype."""
        return tensor.to(parameter_at(self.block, path).dtype)

    def _one_vector(self, path: str, vectors: Tensor) -> Tensor:
        if not self.joint or vectors.ndim == 1:
            return vectors
        vectors = vectors.flatten(0, -2)
        if len(vectors) > 1:
            refused = ValueError if self.kind == "bias" else NoSingleEditError  # a scale can be fitted
            raise refused(
                f"{self.where}.{path}: {len(vectors)} positions need {len(vectors)} vectors, but a joint edit has only "
                "one. Use a query of one token, or give each position its own edits (Patch.applied); where the block "
                "allows it, outer='down' serves several."
            )
        return vectors[0]

    def _named(self, path: str, formula: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return formula(*arguments)
        except ValueError as error:
            hints = {
                "independent": "In the first block, equal tokens can give a map equal inputs.",
                "a_without": "a_without is the input of the MLP without the context.",
                "hidden": "hidden is the input of the last map.",
            }
            hint = next((f" ({said})" for name, said in hints.items() if name in str(error)), "")
            raise type(error)(f"{self.where}.{path}: {error}{hint}") from None


def _fitted_scale(parts: NormParts, wanted: Tensor, counts: Tensor, ridge: float) -> Tensor:
    r"""Return the change of a norm's scale that is best for all rows, feature by feature.

    $$\Delta\gamma_j =
      \frac{\sum_k c_k \bar o_{kj} (t_{kj} - \gamma_j \bar o_{kj})}{\sum_k c_k \bar o_{kj}^2 + \lambda},
      \qquad \lambda = \rho \operatorname{mean}_{k, j} \bar o_{kj}^2$$
    """
    normed, missing = parts.normed.double(), (wanted - parts.scale * parts.normed).double()
    counts = counts.to(normed)[:, None]
    squares = (counts * normed.square()).sum(0) + ridge * normed.square().mean()
    return ((counts * normed * missing).sum(0) / squares).to(wanted.dtype)
