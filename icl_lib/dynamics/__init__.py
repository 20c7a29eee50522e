r"""A prompt read token by token: the path of the weights, and what it has to do with gradient descent.

- :func:`trajectory`: all $W_i$, from one pass; their steps, and the linear losses of which these are gradient steps
- :func:`normalised_lms`: the quadratic loss and the learning rate of each token, where attention is a running average
- :func:`eaten_from_left`: another path, whose rank grows with each token
- :func:`answers`: what a block answers with edited weights, kept as factors
- :func:`task_gradients`, :func:`step_alignment`: the true gradient of the task, and its angle to the steps
"""

from icl_lib.dynamics.from_left import EatenFromLeft, eaten_from_left
from icl_lib.dynamics.lms import NormalisedLMS, normalised_lms
from icl_lib.dynamics.path import Trajectory, trajectory
from icl_lib.dynamics.prefixes import Prefixes
from icl_lib.dynamics.task import answers, step_alignment, task_gradients

__all__ = [
    "EatenFromLeft",
    "NormalisedLMS",
    "Prefixes",
    "Trajectory",
    "answers",
    "eaten_from_left",
    "normalised_lms",
    "step_alignment",
    "task_gradients",
    "trajectory",
]
