r"""A small language model, trained to find the hidden rule.

It is a Llama of `transformers`: RMSNorm, rotary positions, a gated MLP, no biases. Every training prompt is new. The
loss is the cross-entropy of each answer after at least two examples. An answer after fewer examples is a guess, and
from such answers the model would learn which pairs are held out, since their answers never occur. The other tokens are
predicted too, with a small weight, so that the model can continue after its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.paper.hidden_rule.task import VOCABULARY, sample_prompts
from icl_lib.paper.regression import Trainer
from icl_lib.paper.sweep import Checkpoint
from icl_lib.validation import require_size


@dataclass(frozen=True)
class HiddenRuleSettings:
    """The settings of the model and its training; raises `ValueError` for an invalid one.

    Attributes:
        width, blocks, heads, hidden: the sizes of the model; ``hidden`` is the number of hidden units of an MLP.
        fewest, examples: the smallest and largest number of examples before a query; every step draws one. Answers
            after fewer than ``fewest`` examples do not count.
        steps: the number of optimiser steps.
        batch: the number of prompts in a step.
        learning_rate: the peak learning rate of AdamW. It rises over the first twentieth of the steps and then falls
            along a cosine.
        weight_decay: the weight decay of AdamW, for matrices.
        text_weight: the weight of the loss on tokens that are not answers.
        seed: the seed of the initial weights and of the prompts.
        every: the number of steps between two entries of the curve, and between two checkpoints.
    """

    width: int = 64
    blocks: int = 4
    heads: int = 4
    hidden: int = 192
    fewest: int = 2
    examples: int = 6
    steps: int = 8000
    batch: int = 128
    learning_rate: float = 4e-3
    weight_decay: float = 0.1
    text_weight: float = 0.1
    seed: int = 0
    every: int = 100

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "heads", "hidden", "examples", "steps", "batch", "every"):
            require_size(name, getattr(self, name))
        require_size("fewest", self.fewest, 0)
        if self.fewest > self.examples:
            raise ValueError(
                f"fewest is {self.fewest}, but a prompt has {self.examples} examples, so no answer would enter the "
                f"loss: give at most {self.examples}."
            )
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width} with {self.heads} heads: rotary positions rotate pairs of coordinates; "
                f"choose a multiple of {2 * self.heads}."
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}: give a positive number, such as 4e-3.")
        for name in ("weight_decay", "text_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or a positive number, such as 0.1.")


def build(settings: HiddenRuleSettings) -> nn.Module:
    """Return the untrained model; the state of the global random generator is restored."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ImportError("transformers is missing: pip install 'icl_lib[llm]'.") from None
    config = LlamaConfig(
        vocab_size=VOCABULARY.size,
        hidden_size=settings.width,
        intermediate_size=settings.hidden,
        num_hidden_layers=settings.blocks,
        num_attention_heads=settings.heads,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        initializer_range=0.5 * settings.width**-0.5,
        # With the usual ids, these tokens would be numbers, and generation would stop at them.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def losses(model: nn.Module, ids: Int[Tensor, "count tokens"]) -> tuple[Float[Tensor, " answers"], Float[Tensor, ""]]:
    """Return the mean cross-entropy of each answer, in the order of the prompt, and of all other tokens.

    Args:
        ids: as in :attr:`icl_lib.paper.hidden_rule.task.Prompts.answered`.
    """
    logits = model(ids[:, :-1]).logits
    each = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
    is_answer = torch.arange(len(each)) % 6 == 3
    return each[is_answer], each[~is_answer].mean()


class HiddenRuleTrainer(Trainer):
    """The model in training, with everything that the next step depends on, so that a run can be continued.

    Attributes:
        curve: dictionaries of ``step`` and ``loss``, the mean loss of each answer since the last entry.

    >>> settings = HiddenRuleSettings(width=8, blocks=1, heads=1, hidden=8, steps=2, batch=2, examples=2)
    >>> first, again = HiddenRuleTrainer(settings), HiddenRuleTrainer(settings)
    >>> _, state = first.advance(), first.state_dict()
    >>> again.load_state_dict(state)
    >>> first.advance() == again.advance()
    True
    """

    largest_gradient = 1.0

    def __init__(self, settings: HiddenRuleSettings) -> None:
        super().__init__(lambda: build(settings), settings, torch.float32)
        self.curve: list[dict[str, Any]] = []
        self._recent: list[Tensor] = []

    def _optimisation(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        from transformers import get_cosine_schedule_with_warmup  # `build` raises the error if it is missing

        settings, weights = self.settings, list(self.model.parameters())
        matrices, scales = ([weight for weight in weights if (weight.ndim > 1) == many] for many in (True, False))
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": scales, "weight_decay": 0.0}],
            settings.learning_rate,
            betas=(0.9, 0.98),
        )
        return optimiser, get_cosine_schedule_with_warmup(optimiser, max(1, settings.steps // 20), settings.steps)

    def _draw_loss(self) -> Tensor:
        settings = self.settings
        examples = int(torch.randint(settings.fewest, settings.examples + 1, (), generator=self._prompts))
        answers, text = losses(self.model, sample_prompts(settings.batch, examples, self._prompts).answered)
        self._recent.append(answers.detach())
        return answers[settings.fewest :].mean() + settings.text_weight * text

    def advance(self) -> float:
        """Take one optimiser step and return the loss before it; every ``settings.every`` steps, add to the curve."""
        loss = super().advance()
        if self.step % self.settings.every == 0 or self.step == self.settings.steps:
            means = pad_sequence(self._recent, padding_value=float("nan")).nanmean(1)
            self.curve.append({"step": self.step, "loss": [float(f"{mean:.4g}") for mean in means]})
            self._recent = []
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "curve": list(self.curve), "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.curve, self._recent = list(state["curve"]), list(state["recent"])


def train_hidden_rule(
    settings: HiddenRuleSettings | None = None, checkpoint: Checkpoint | None = None, progress: bool = True
) -> HiddenRuleTrainer:
    """Train a model, or continue from ``checkpoint``; the same settings give the same model on the same machine.

    It computes with one thread, because the rounding of a sum depends on how it is split among threads.

    Args:
        checkpoint: stores the state every ``settings.every`` steps and at the end; a finished run is not run again.
        progress: show a progress bar (never while the book is built).
    """
    trainer = HiddenRuleTrainer(settings or HiddenRuleSettings())
    saved = checkpoint.load() if checkpoint is not None else None
    if saved is not None:
        trainer.load_state_dict(saved)
    steps, hidden = trainer.settings.steps, not progress or building_book()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tqdm(total=steps, initial=trainer.step, desc="training", unit="step", disable=hidden) as bar:
            while trainer.step < steps:
                loss = trainer.advance()
                bar.update()
                if trainer.step % trainer.settings.every == 0 or trainer.step == steps:
                    bar.set_postfix(loss=f"{loss:.3g}")
                    if checkpoint is not None:
                        checkpoint.save(trainer.state_dict())
    finally:
        torch.set_num_threads(threads)
    trainer.model.requires_grad_(False).eval()
    return trainer
