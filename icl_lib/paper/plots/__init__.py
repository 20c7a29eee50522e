"""The chapters' figures as functions from data to a :class:`~icl_lib.paper.figures.Figure`."""

from icl_lib.paper.plots.compiling import accuracy_by_task, divergence_by, divergence_over_time, linear_shares
from icl_lib.paper.plots.cost import scaling
from icl_lib.paper.plots.every_block import (
    alignments,
    differences,
    errors_by_block,
    errors_by_depth,
    losses,
    norms,
    renumberings,
    varied,
)
from icl_lib.paper.plots.language import answer_squares, stream_sizes, written
from icl_lib.paper.plots.learning import agreement, answers, bars, curves, head_columns
from icl_lib.paper.plots.one_block import removal, solution_family, training_curves
from icl_lib.paper.plots.token_by_token import (
    increments,
    invented_losses,
    learning,
    ranks,
    scrubbed,
    step_cosines,
    token_losses,
)
from icl_lib.paper.plots.trained_attention import (
    distances,
    drop,
    matrices,
    rates_found,
    shrinkage,
    staircase,
)
