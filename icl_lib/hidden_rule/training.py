r"""A small language model of today's kind, trained to find the hidden rule.

RMS norm, rotary positions, a gated MLP, no biases: a Llama, in the shape that `transformers` gives it. Every training
prompt is drawn afresh. The loss is the cross-entropy of each answer that two examples or more come before. With fewer
the answer is a guess, and from guesses the model would learn which pairs are held out: their answers never come. The
other tokens are predicted too, with a small weight, so that the model can go on after its answer.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from icl_lib.environment import building_book
from icl_lib.hidden_rule.task import VOCABULARY, sample_prompts
from icl_lib.sweep import Checkpoint
from icl_lib.validation import require_size


@dataclass(frozen=True)
class HiddenRuleSettings:
    """The model and its training; `ValueError` for a setting that makes no sense.

    Attributes:
        width, blocks, heads, hidden: of the model; ``hidden`` is the width of the MLP inside.
        fewest, examples: examples before a query. Every step draws their number; answers that come after fewer examples
            do not count.
        steps: optimiser steps.
        batch: prompts in a step.
        learning_rate: AdamW's, at its peak: up over the first twentieth of the steps, then down along a cosine.
        weight_decay: AdamW's, of matrices.
        text_weight: of the loss on tokens that are no answers.
        seed: of the initial weights and of the prompts.
        every: steps between two entries of the curve, and between two checkpoints.
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
            raise ValueError(f"fewest is {self.fewest} of {self.examples} examples: no answer counts; choose fewer.")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width} with {self.heads} heads: rotary positions turn pairs of coordinates; "
                f"choose a multiple of {2 * self.heads}."
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}: give a positive number, such as 4e-3.")
        for name in ("weight_decay", "text_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give 0 or a positive number, such as 0.1.")


def build(settings: HiddenRuleSettings) -> nn.Module:
    """The untrained model; the global random generator is put back afterwards."""
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
        # The usual ids of these would be numbers here, and generation would stop at them.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(config)


def losses(model: nn.Module, ids: Int[Tensor, "count tokens"]) -> tuple[Float[Tensor, " answers"], Float[Tensor, ""]]:
    """Mean cross-entropy of each answer, the first example's first, and of all other tokens.

    Args:
        ids: as of :attr:`icl_lib.hidden_rule.task.Prompts.answered`.
    """
    logits = model(ids[:, :-1]).logits
    each = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)
    is_answer = torch.arange(len(each)) % 6 == 3
    return each[is_answer], each[~is_answer].mean()


class HiddenRuleTrainer:
    """A model in training: everything that the next step depends on, so that a run can stop and go on.

    Attributes:
        model: the model, as it is now.
        step: optimiser steps taken.
        curve: dicts of ``step`` and ``loss``, the mean loss of each answer since the last entry.

    >>> settings = HiddenRuleSettings(width=8, blocks=1, heads=1, hidden=8, steps=2, batch=2, examples=2)
    >>> first, again = HiddenRuleTrainer(settings), HiddenRuleTrainer(settings)
    >>> _, state = first.advance(), first.state_dict()
    >>> again.load_state_dict(state)
    >>> bool((first.advance() == again.advance()).all())
    True
    """

    def __init__(self, settings: HiddenRuleSettings) -> None:
        self.settings, self.model, self.step = settings, build(settings), 0
        from transformers import get_cosine_schedule_with_warmup  # `build` has said it where there is none

        self.curve: list[dict[str, Any]] = []
        self._recent: list[Tensor] = []
        self._prompts = torch.Generator().manual_seed(settings.seed + 1)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        scales = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        self._optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": scales, "weight_decay": 0.0}],
            settings.learning_rate,
            betas=(0.9, 0.98),
        )
        warm_up = max(1, settings.steps // 20)
        self._schedule = get_cosine_schedule_with_warmup(self._optimiser, warm_up, settings.steps)

    def advance(self) -> Float[Tensor, " answers"]:
        """Take one optimiser step; gives the loss of each answer before it."""
        settings = self.settings
        examples = int(torch.randint(settings.fewest, settings.examples + 1, (), generator=self._prompts))
        prompts = sample_prompts(settings.batch, examples, self._prompts)
        answers, text = losses(self.model, prompts.answered)
        loss = answers[settings.fewest :].mean() + settings.text_weight * text
        if not torch.isfinite(loss):
            raise ValueError(
                f"the loss is not finite at step {self.step}: lower learning_rate, now {settings.learning_rate}."
            )
        self._optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimiser.step()
        self._schedule.step()
        self.step += 1
        self._recent.append(answers.detach())
        if self.step % settings.every == 0 or self.step == settings.steps:
            means = pad_sequence(self._recent, padding_value=float("nan")).nanmean(1)
            self.curve.append({"step": self.step, "loss": [float(f"{mean:.4g}") for mean in means]})
            self._recent = []
        return answers.detach()

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` takes to go on from here, bit for bit."""
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "curve": self.curve,
            "recent": self._recent,
            "model": self.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "prompts": self._prompts.get_state(),
        }
        return copy.deepcopy(state)  # training goes on; what was saved must not

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another trainer of the same settings was; `ValueError` for other settings."""
        mine = asdict(self.settings)
        other = {name: value for name, value in state["settings"].items() if value != mine[name]}
        if other:
            raise ValueError(f"the saved run has other settings, {other}: delete its file, or use these.")
        self.step, self.curve, self._recent = state["step"], list(state["curve"]), list(state["recent"])
        self.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        self._prompts.set_state(state["prompts"])


def train_hidden_rule(
    settings: HiddenRuleSettings | None = None, checkpoint: Checkpoint | None = None, progress: bool = True
) -> HiddenRuleTrainer:
    """Train a model, or go on where ``checkpoint`` is; the same settings give the same model on the same machine.

    It computes with one thread: how a sum is split among threads decides how it is rounded.

    Args:
        checkpoint: keeps the state every ``settings.every`` steps, also the last: a run that is done is not run again.
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
                answers = trainer.advance()
                bar.update()
                if trainer.step % trainer.settings.every == 0 or trainer.step == steps:
                    bar.set_postfix(loss=f"{answers[-1]:.3g}")
                    if checkpoint is not None:
                        checkpoint.save(trainer.state_dict())
    finally:
        torch.set_num_threads(threads)
    trainer.model.requires_grad_(False).eval()
    return trainer
