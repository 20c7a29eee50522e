r"""A prompt read token by token: the path of the weights, and how it is related to gradient descent.

- :func:`trajectory`: all $W_i$ from one pass, their steps, and the linear losses on which these are gradient steps
- :func:`normalised_lms`: the quadratic loss and the learning rate of each token, where attention is a running average
- :func:`eaten_from_left`: another path, whose rank grows with each token
- :func:`answers`: a block's outputs on the bare query with edited weights, kept as factors
- :func:`task_gradients`, :func:`step_alignment`: the gradient of the task's loss, and the cosine of each step with it
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
