"""The papers' figures as functions: settings in, tidy data out, no drawing."""

from icl_lib.experiments.one_block import (
    ONE_BLOCK,
    TrainingCurves,
    relative_difference,
    run_edited,
    training_curves,
    validate,
)

__all__ = [
    "ONE_BLOCK",
    "TrainingCurves",
    "relative_difference",
    "run_edited",
    "training_curves",
    "validate",
]
