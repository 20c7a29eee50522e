"""The chapters' pictures: data in, :class:`~icl_lib.figures.Figure` out."""

from icl_lib.plots.one_block import removal, solution_family, training_curves

__all__ = ["removal", "solution_family", "training_curves"]
