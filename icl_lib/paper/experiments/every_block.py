r"""The identity in every block and at every position, during training: the experiments of Innocenti and Achour.

The paper is arXiv 2512.11255, version 1. At each step the test loss is measured on fresh prompts, in several ways:

- *experiment*: the model reads the whole prompts;
- *theory*, as in the paper: its last block is edited and reads the query's stream alone;
- *patched*: all blocks are edited, and the model reads the bare queries;
- as controls, the last two without their edits.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from icl_lib.blocks.transformer import Transformer, TransformerConfig
from icl_lib.low_rank import LowRank
from icl_lib.measures import relative_error
from icl_lib.models.absorb import anatomy_of, cache
from icl_lib.models.activations import on_input
from icl_lib.models.anatomy import sites
from icl_lib.models.block_edits import BlockEdits
from icl_lib.models.passes import without_context
from icl_lib.models.streams import Stream
from icl_lib.paper.experiments.alignment import cosines, likeness, within_block
from icl_lib.paper.regression import Diverged, Prompts, Trainer, TrainingSettings, mean_squared_error, sample_prompts
from icl_lib.paper.sweep import Checkpoint
from icl_lib.theorem import alignment
from icl_lib.validation import require_size

COLUMNS = {
    "training": "loss on the step's training prompts",
    "experiment": "test loss of the model that reads the prompts",
    "theory": "test loss of its edited last block on the query's stream alone",
    "unedited": "the same without the edit; control",
    "patched": "test loss of the model on the bare query, with the query's edits in all blocks",
    "bare": "the same without the edits; control",
}
"""What is measured once a step; a loss is half the mean squared error, as in the paper."""

BLOCK_COLUMNS = {
    "difference": "mean squared difference of the edited block's output from the block's with context, all positions",
    "largest": "largest squared difference of a single entry of these outputs",
    "control": "mean squared difference without the edit; control",
    "error": "largest relative error of the edited block over prompts and positions",
    "frobenius": "Frobenius norm of the last position's update, mean over prompts",
    "spectral": "its spectral norm",
    "second": "second singular value of the sum of all positions' updates over the first; largest over prompts",
    "likeness": "correlation of its table of alignments between positions with the first block's, mean over prompts",
    "unlike": "the same with the first block's table for another prompt; control",
    "tokens": "the same with a table made from the prompt's tokens alone, cos(c_i − x, c_j − x); control",
    "across": "absolute cosine of the last position's update and the first block's, mean over prompts",
    "renumbered": "the same, averaged over random orders of the block's hidden units; control",
}
"""What is measured once a step in each block."""

ALIGNED_PROMPTS, ALIGNED_POSITIONS, NUMBERINGS = 16, 51, 20
"""Numbers of prompts, of positions at their end, and of random orders in the comparison of blocks. They bound the size
of its tables."""


@dataclass(frozen=True)
class EveryBlockSettings:
    """One training run; the defaults are those of the paper's Figure 1.

    Attributes:
        tasks: prompts in a step, each with its own task.
        length: tokens in a prompt, the query included.
        features: input features, $d_x$; a token has one more.
        blocks: number of blocks.
        heads: attention heads in a block; must divide ``features + 1``.
        norm: ``none``, or ``pre`` for layer norm before each sublayer (Figure A.3).
        steps: optimiser steps.
        learning_rate: Adam's, constant.
        seed: seed of the initial weights and of all prompts.
        dtype: ``float32``, as in the paper, or ``float64``.
        device: the device of the model and the prompts.
    """

    tasks: int = 128
    length: int = 51
    features: int = 2
    blocks: int = 5
    heads: int = 3
    norm: str = "none"
    steps: int = 100
    learning_rate: float = 5e-2
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        require_size("tasks", self.tasks, least=2)  # a control compares two different prompts
        require_size("length", self.length, least=4)  # tables of positions with more than one pair
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype is {self.dtype!r}: choose 'float32' or 'float64'.")
        self.config, self.training  # noqa: B018 (both check the other settings)

    @property
    def config(self) -> TransformerConfig:
        """A causal model with skip connections; its MLPs have two hidden layers, four times as wide as a token."""
        return TransformerConfig(
            dim=self.features + 1, blocks=self.blocks, heads=self.heads, hidden_layers=2, norm=self.norm
        )

    @property
    def training(self) -> TrainingSettings:
        """The settings of the training run."""
        return TrainingSettings(
            steps=self.steps,
            batch=self.tasks,
            examples=self.length - 1,
            features=self.features,
            learning_rate=self.learning_rate,
            schedule="constant",
            seed=self.seed,
            every=1,
        )

    def trainer(self) -> Trainer:
        """The untrained model, ready to be trained."""
        return Trainer(lambda: Transformer(self.config), self.training, getattr(torch, self.dtype), self.device)

    def test_prompts(self, step: int) -> Prompts:
        """Return the test prompts of a step, which are new at each step."""
        generator = torch.Generator().manual_seed((self.seed + 1) * 1_000_003 + step)
        dtype = getattr(torch, self.dtype)
        return sample_prompts(self.tasks, self.length - 1, self.features, generator, dtype, self.device)


def measure_every_block(model: Transformer, prompts: Prompts) -> dict[str, Any]:
    """Compare theory and experiment in every block and at every position, on a batch of prompts.

    Returns ``COLUMNS`` except ``training`` as numbers, and ``BLOCK_COLUMNS`` as lists with one entry for each block.
    """
    prompt = Stream(model, prompts.sequence, prompts.sequence.shape[-2] - 1)
    placed = sites(model, anatomy_of(model))
    columns: dict[str, Any] = {name: [] for name in BLOCK_COLUMNS}
    found: list[tuple[Tensor, LowRank]] = []
    read: list[Tensor] = []  # the query's stream, as it enters each block

    def note(_: int, patched: Tensor, edits: BlockEdits) -> None:
        found.append((patched, edits.patch().weight))

    cached, with_prompt = cache(model, placed, prompt, prompts.sequence, keep=1)
    with contextlib.ExitStack() as stack:
        for site in placed:
            on_input(stack, site.block, read.append)
        edited = without_context(model, placed, cached, prompt.outer, visit=note)
    for site, stream, activations, (patched, weight) in zip(placed, read, cached.blocks, found, strict=True):
        output = activations.output
        with torch.no_grad():
            unedited = site.block(stream)
        final, total = weight[:, -1], weight.sum(-3).dense()
        singular = torch.linalg.svdvals(total)
        squared = (patched - output).square()
        columns["difference"].append(squared.mean().item())
        columns["largest"].append(squared.max().item())
        columns["control"].append((unedited - output).square().mean().item())
        columns["error"].append(relative_error(patched, output).max().item())
        columns["frobenius"].append(final.norm().mean().item())
        columns["spectral"].append(final.singular_values()[..., 0].mean().item())
        columns["second"].append((singular[:, 1] / singular[:, 0]).max().item())
    with torch.no_grad():
        bare = model(cached.bare)
    outputs = {"experiment": with_prompt, "theory": model.unembed(patched), "unedited": model.unembed(unedited)}
    outputs |= {"patched": edited, "bare": bare}
    updates = [weight[:ALIGNED_PROMPTS, -ALIGNED_POSITIONS:] for _, weight in found]
    tokens = prompts.sequence[:ALIGNED_PROMPTS, -ALIGNED_POSITIONS:]
    columns.update(_alignments(updates, tokens))
    losses = {name: mean_squared_error(output[:, -1], prompts).item() / 2 for name, output in outputs.items()}
    return {**losses, **columns}


def _alignments(updates: list[LowRank], tokens: Tensor) -> dict[str, list[float]]:
    """Return the columns that compare blocks, from their updates ``[prompts, positions, out, in]``."""
    tables = [within_block(update) for update in updates]
    # The query's difference from itself is zero and has no direction, so the tables are compared without it.
    of_tokens = cosines((tokens - tokens[:, -1:])[:, :-1])
    final = [update[:, -1] for update in updates]
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(final[0].shape[-2], generator=generator) for _ in range(NUMBERINGS)])
    moved = [LowRank(update.left[:, orders], update.right[:, None]) for update in final]
    return {
        "likeness": [likeness(table, tables[0]).mean().item() for table in tables],
        "unlike": [likeness(table, tables[0].roll(1, 0)).mean().item() for table in tables],
        "tokens": [likeness(table[:, :-1, :-1], of_tokens).mean().item() for table in tables],
        "across": [alignment(update, final[0]).abs().mean().item() for update in final],
        "renumbered": [alignment(update, final[0][:, None]).abs().mean().item() for update in moved],
    }


def run_every_block(
    settings: EveryBlockSettings, checkpoint: Checkpoint | None = None, every: int = 10
) -> dict[str, list]:
    """Train a model and compare theory and experiment at every step, before that step is taken.

    Args:
        checkpoint: the file for the state of an unfinished run; a stopped run continues from it, bit for bit.
        every: steps between two checkpoints.

    Returns one list for each of ``COLUMNS`` and ``BLOCK_COLUMNS``, with one entry for each step. If training diverges,
    the entries from that step on are None.

    >>> result = run_every_block(EveryBlockSettings(tasks=4, length=6, steps=2))
    >>> len(result["theory"]), len(result["difference"]), len(result["difference"][0])
    (2, 2, 5)
    """
    trainer = settings.trainer()
    records: list[dict[str, Any]] = []
    state = checkpoint.load() if checkpoint else None
    if state:
        trainer.load_state_dict(state["trainer"])
        records = state["records"]
    while trainer.step < settings.steps:
        try:
            trainer.loss()  # raises before the measurement, which needs finite numbers
            record = measure_every_block(trainer.model, settings.test_prompts(trainer.step))
            record["training"] = trainer.advance() / 2
        except Diverged:
            break
        records.append(record)
        if checkpoint and trainer.step % every == 0:
            checkpoint.save({"trainer": trainer.state_dict(), "records": records})
    missing = [None] * (settings.steps - len(records))
    return {name: [record[name] for record in records] + missing for name in (*COLUMNS, *BLOCK_COLUMNS)}
