"""The papers' experiments as functions from settings to data; :mod:`icl_lib.paper.plots` draws them."""

from icl_lib.paper.experiments.alignment import between_blocks, cosines, likeness, renumbered, within_block
from icl_lib.paper.experiments.architectures import (
    LANGUAGE_MODELS,
    MORE_LANGUAGE_MODELS,
    small_language_model,
    survey,
)
from icl_lib.paper.experiments.every_block import (
    BLOCK_COLUMNS,
    COLUMNS,
    EveryBlockSettings,
    measure_every_block,
    run_every_block,
)
from icl_lib.paper.experiments.language import edited_for_questions
from icl_lib.paper.experiments.one_block import (
    ONE_BLOCK,
    TrainingCurves,
    run_edited,
    smaller_edits,
    training_curves,
    validate,
    with_other_tail,
)
from icl_lib.paper.experiments.paper_scale import VARIED, paper_settings, summarise, write_figures
from icl_lib.paper.experiments.parts import head_matrices, with_initial
from icl_lib.paper.experiments.softmax_heads import HeadSettings, head_settings, run_softmax_heads, write_softmax_heads
from icl_lib.paper.experiments.token_by_token import (
    BesideSGD,
    Cosines,
    Estimate,
    TokenByToken,
    compare_with_sgd,
    decay_exponent,
    estimate,
    lower_next,
    ranks_from_left,
    read_token_by_token,
    recurrent_block,
)
