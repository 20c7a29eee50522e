"""Prompts compiled into weights on a language model that people know, compared with other ways to replace a prompt."""

from icl_lib.paper.compiling.baselines import (
    behind_prompt,
    corrected,
    distilled,
    padded,
    replies,
    without_prompt,
    write,
)
from icl_lib.paper.compiling.comparison import (
    METHODS,
    Comparison,
    chosen,
    comparisons,
    run_comparison,
    summarise,
    write_comparison,
)
from icl_lib.paper.compiling.linear_share import linear_share
from icl_lib.paper.compiling.tasks import MESSAGES, SYSTEM_PROMPTS, TASKS, UNRELATED, FewShotSplit, FewShotTask
