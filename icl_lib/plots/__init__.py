"""The chapters' pictures: data in, :class:`~icl_lib.figures.Figure` out."""

from icl_lib.plots.cost import scaling
from icl_lib.plots.every_block import (
    alignments,
    differences,
    errors_by_block,
    losses,
    norms,
    renumberings,
    varied,
)
from icl_lib.plots.one_block import removal, solution_family, training_curves

__all__ = [
    "alignments",
    "differences",
    "errors_by_block",
    "losses",
    "norms",
    "removal",
    "renumberings",
    "scaling",
    "solution_family",
    "training_curves",
    "varied",
]
