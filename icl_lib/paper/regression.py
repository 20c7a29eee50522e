r"""In-context linear regression, the task of the papers: its prompts, and training on it.

A prompt is $(x_1, \langle w, x_1\rangle), \dots, (x_N, \langle w, x_N\rangle), (x_q, 0)$ with $x_i, w \sim
\mathcal N(0, I_d)$. The right answer is $\langle w, x_q\rangle$. The model's answer is the last coordinate of its
output at the last position. Every prompt has its own $w$, so the answer must come from the examples.

Source: Garg et al. 2022 (arXiv 2208.01066), with the setting of Dherin et al. (arXiv 2507.16003, version 1), Figure 2.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.validation import require_size


@dataclass(frozen=True, eq=False)
class Prompts:
    """Regression prompts with their right answers.

    Attributes:
        sequence: ``[count, N + 1, d + 1]``: the examples ``(x_i, y_i)``, then the query ``(x_q, 0)``.
        target: ``[count]``: the right answers.
        task: ``[count, d]``: the hidden weights $w$.
    """

    sequence: Float[Tensor, "count length dim"]
    target: Float[Tensor, " count"]
    task: Float[Tensor, "count features"]

    @property
    def context(self) -> Float[Tensor, "count n dim"]:
        """The examples."""
        return self.sequence[:, :-1]

    @property
    def query(self) -> Float[Tensor, "count dim"]:
        """The query token."""
        return self.sequence[:, -1]

    @property
    def questions(self) -> Float[Tensor, "count n dim"]:
        """The examples as bare queries, ``(x_i, 0)``; their right answers are ``context[..., -1]``."""
        questions = self.context.clone()
        questions[..., -1] = 0
        return questions

    def in_order(self, order: Int[Tensor, " n"]) -> Prompts:
        """The same prompts with their examples in another order, such as ``torch.randperm(n)``."""
        sequence = torch.cat([self.context[:, order], self.sequence[:, -1:]], dim=1)
        return Prompts(sequence, self.target, self.task)


def sample_prompts(
    count: int,
    examples: int,
    features: int,
    seed: int | torch.Generator,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Prompts:
    """Draw prompts; the same seed gives the same prompts in every dtype and on every device.

    >>> prompts = sample_prompts(count=4, examples=10, features=2, seed=0)
    >>> prompts.sequence.shape, prompts.target.shape
    (torch.Size([4, 11, 3]), torch.Size([4]))
    >>> bool(torch.allclose(prompts.target, (prompts.task * prompts.query[:, :2]).sum(-1)))
    True
    """
    for name, size, least in (("count", count, 1), ("examples", examples, 0), ("features", features, 1)):
        require_size(name, size, least)
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: give a floating-point dtype.")
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, examples + 1, features, generator=generator, dtype=torch.float64)
    task = torch.randn(count, features, generator=generator, dtype=torch.float64)
    outputs = (inputs @ task.unsqueeze(-1)).squeeze(-1)
    target = outputs[:, -1].clone()
    outputs[:, -1] = 0
    sequence = torch.cat([inputs, outputs.unsqueeze(-1)], dim=-1)
    return Prompts(*(tensor.to(device, dtype) for tensor in (sequence, target, task)))


def prediction(output: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """The model's answer: the last coordinate of its output at the query."""
    return output[..., -1]


def squared_error(output: Float[Tensor, "*batch dim"], answer: Float[Tensor, "*#batch"]) -> Float[Tensor, "*batch"]:
    """The squared error of each answer in a model's outputs."""
    return (prediction(output) - answer).square()


def mean_squared_error(output: Float[Tensor, "count dim"], prompts: Prompts) -> Float[Tensor, ""]:
    """The task's loss for outputs at the query."""
    return squared_error(output, prompts.target).mean()


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained, with fresh prompts at every step; a `ValueError` for an invalid setting.

    Attributes:
        steps: optimiser steps.
        batch: prompts in a step.
        examples: examples in a prompt, $N$.
        features: input features, $d$.
        learning_rate: Adam's, at its peak.
        schedule: ``cosine``, a warm-up followed by a cosine down to zero, or ``constant``.
        seed: seed of the initial weights and of the prompts.
        every: steps between two measurements.
    """

    steps: int = 1000
    batch: int = 128
    examples: int = 100
    features: int = 2
    learning_rate: float = 3e-3
    schedule: str = "cosine"
    seed: int = 0
    every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "examples", "features", "every"):
            require_size(name, getattr(self, name))
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}: give a positive number, such as 3e-3.")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}: choose 'cosine' or 'constant'.")


class Diverged(ValueError):
    """The loss or its gradient is not finite."""

    def __init__(self, what: str, trainer: Trainer) -> None:
        rate = trainer.settings.learning_rate
        super().__init__(f"the {what} is not finite at step {trainer.step}: lower learning_rate, now {rate}.")


class Trainer:
    """A model in training, with the whole state of the run, so that it can be stopped and continued elsewhere.

    Args:
        build: makes the untrained model, any module with a method ``at_query(sequence)``, such as a
            :class:`~icl_lib.blocks.transformer.Transformer` or a :class:`~icl_lib.blocks.block.ContextualBlock`. It is
            called with the random generator seeded by ``settings.seed``; the state of the global generator is restored.
        settings: see :class:`TrainingSettings`; a subclass has its own.

    Attributes:
        model: the current model.
        step: optimiser steps taken.

    >>> from icl_lib import Transformer, TransformerConfig
    >>> settings = TrainingSettings(steps=2, batch=4, examples=5)
    >>> first, again = (Trainer(lambda: Transformer(TransformerConfig(dim=3)), settings) for _ in range(2))
    >>> _, state = first.advance(), first.state_dict()
    >>> loss = first.advance()
    >>> again.load_state_dict(state)
    >>> again.advance() == loss
    True
    """

    largest_gradient = float("inf")
    """The norm above which gradients are scaled down to it."""

    def __init__(
        self,
        build: Callable[[], nn.Module],
        settings: Any,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = build().to(device, dtype)
        self.settings, self.step = settings, 0
        self._prompts = torch.Generator().manual_seed(settings.seed + 1)
        self._optimiser, self._schedule = self._optimisation()
        self._loss: Tensor | None = None

    def _optimisation(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        steps, schedule = self.settings.steps, self.settings.schedule
        optimiser = torch.optim.Adam(self.model.parameters(), self.settings.learning_rate)

        def rate(step: int) -> float:
            return _warm_up_then_cosine(step, steps) if schedule == "cosine" else 1.0

        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, rate)

    def _draw_loss(self) -> Tensor:
        like, of = next(self.model.parameters()), self.settings
        batch = sample_prompts(of.batch, of.examples, of.features, self._prompts, like.dtype, like.device)
        return mean_squared_error(self.model.at_query(batch.sequence), batch)

    def loss(self) -> float:
        """The loss on the prompts of the next step.

        Raises :class:`Diverged` if it is not finite.
        """
        if self._loss is None:
            self._loss = self._draw_loss()
        if not torch.isfinite(self._loss):
            raise Diverged("loss", self)
        return self._loss.item()

    def advance(self) -> float:
        """Take one optimiser step and return the loss before it.

        Raises :class:`Diverged` if the loss or its gradient is not finite; the model then stays as it was.
        """
        loss = self.loss()
        self._optimiser.zero_grad()
        self._loss.backward()
        if not nn.utils.clip_grad_norm_(self.model.parameters(), self.largest_gradient).isfinite():
            raise Diverged("gradient", self)
        self._optimiser.step()
        self._schedule.step()
        self._loss, self.step = None, self.step + 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The state from which :meth:`load_state_dict` continues bit for bit."""
        if self._loss is not None:
            raise ValueError("the prompts of the next step are drawn already: call state_dict() right after advance().")
        state = {name: part.state_dict() for name, part in self._parts().items()}
        state |= {"settings": asdict(self.settings), "step": self.step, "prompts": self._prompts.get_state()}
        return copy.deepcopy(state)  # further training must not change it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another trainer; raises `ValueError` if its settings differ."""
        mine = asdict(self.settings)
        other = {name: value for name, value in state["settings"].items() if value != mine[name]}
        if other:
            raise ValueError(f"the saved run has other settings, {other}: delete its file, or use its settings.")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self._prompts.set_state(state["prompts"])
        self.step, self._loss = state["step"], None

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimiser": self._optimiser, "schedule": self._schedule}


def train(
    build: Callable[[], nn.Module],
    settings: TrainingSettings,
    measure: Callable[[int, float, nn.Module], None] | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> nn.Module:
    """Build a model and train it; on one machine, the same settings give the same model bit for bit.

    Args:
        build, settings: as for :class:`Trainer`.
        measure: called as ``measure(step, training_loss, model)`` before the first step, every ``settings.every`` steps
            and after the last one.
        progress: show a progress bar (never while the book is built).

    Raises :class:`Diverged` if the loss or its gradient is not finite.
    """
    trainer = Trainer(build, settings, dtype, device)
    bar = tqdm(range(settings.steps + 1), desc="training", unit="step", disable=not progress or building_book())
    for step in bar:
        loss = trainer.loss()
        if step % settings.every == 0 or step == settings.steps:
            bar.set_postfix(loss=f"{loss:.3g}")
            if measure is not None:
                with torch.no_grad():
                    measure(step, loss, trainer.model)
        if step < settings.steps:
            trainer.advance()
    return trainer.model.requires_grad_(False).eval()


def _warm_up_then_cosine(step: int, steps: int) -> float:
    """The learning rate as a fraction of its peak: a linear rise over the first tenth, then a cosine down to zero."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2
