r"""Fine-tuning of the first linear map on the examples of a prompt, to compare with reading them.

Source: Dherin et al. (arXiv 2507.16003, version 1), Figure 4.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from icl_lib.blocks.block import ContextualBlock, require_block
from icl_lib.dynamics.task import answers, task_gradients
from icl_lib.low_rank import LowRank
from icl_lib.paper.regression import Prompts, squared_error
from icl_lib.validation import require_instance


def fine_tune(block: ContextualBlock, prompts: Prompts, learning_rate: float | int) -> LowRank:
    r"""Train the first linear map of a block by SGD on the examples of each prompt, one step for each example.

    $$W_i = W_{i-1} - \eta\, \nabla_U \bigl(T_U(x_i) - y_i\bigr)^2 \Big|_{U = W_{i-1}}, \qquad W_0 = W .$$

    The block reads the input of an example as a bare query, $(x_i, 0)$ without a context; its answer is the last
    coordinate. Each prompt trains its own copy of the map, and nothing else is trained. Source: Dherin et al. (arXiv
    2507.16003, version 1), Figure 4.

    Each step has rank one. The result holds all steps side by side: ``[count, out, in]``, of rank at most $N$. The sum
    of its first $i$ terms, ``.first(i)``, is $W_i - W$. The block does not change.

    Raises `ValueError` for prompts without examples and for a learning rate that is negative or not finite.

    >>> from icl_lib import MeanPooling
    >>> from icl_lib.paper.regression import sample_prompts
    >>> block = ContextualBlock(MeanPooling(), torch.nn.Linear(3, 3)).double()
    >>> fine_tune(block, sample_prompts(count=4, examples=10, features=2, seed=0), 0.01)
    LowRank(shape=(4, 3, 3), rank≤10, dtype=torch.float64, device=cpu)
    """
    _require_examples(block, prompts)
    if isinstance(learning_rate, bool) or not 0 <= learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}: give zero or a positive number, such as 0.01.")
    weight, questions, answered = block.first_linear.weight, prompts.questions, prompts.context[..., -1]
    # [step, count, size]: the room for all steps is taken once, and each step reads the part that is filled.
    left, right = (weight.new_zeros(questions.shape[1], len(questions), size) for size in weight.shape)
    for i, (question, answer) in enumerate(zip(questions.unbind(1), answered.unbind(1), strict=True)):
        so_far = LowRank(left[:i].movedim(0, -1), right[:i].movedim(0, -1))
        gradient = task_gradients(block, so_far, question, functools.partial(squared_error, answer=answer))
        left[i], right[i] = -learning_rate * gradient.left.squeeze(-1), gradient.right.squeeze(-1)
    return LowRank(left.movedim(0, -1), right.movedim(0, -1))


def fine_tuned_losses(block: ContextualBlock, prompts: Prompts, steps: LowRank) -> Float[Tensor, "count steps"]:
    r"""The squared error at each prompt's query after $0, 1, \dots, N$ of the ``steps`` that :func:`fine_tune` took.

    The block reads the bare query with the weights $W_i$.
    """
    _require_examples(block, prompts)
    require_instance("steps", steps, LowRank, "give what fine_tune returns.")
    outputs = [answers(block, steps.first(count), prompts.query) for count in range(steps.left.shape[-1] + 1)]
    return squared_error(torch.stack(outputs, dim=-2), prompts.target.unsqueeze(-1))


def _require_examples(block: ContextualBlock, prompts: Prompts) -> None:
    require_block(block)
    require_instance("prompts", prompts, Prompts, "give what sample_prompts returns.")
    if prompts.context.shape[-2] == 0:
        raise ValueError("prompts hold no examples to train on: sample them with examples ≥ 1.")
