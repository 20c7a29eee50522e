"""The puzzle with a hidden rule, and the small language model trained on it."""

from icl_lib.paper.hidden_rule.checkpoint import export, load_hidden_rule, save_hidden_rule, tokenizer
from icl_lib.paper.hidden_rule.evaluation import accuracy, measure, measure_edited, measure_swapped, replies
from icl_lib.paper.hidden_rule.new_rules import measure_rules, nearest_answers, sample_of_rules
from icl_lib.paper.hidden_rule.reading import measure_cascade, of_blocks
from icl_lib.paper.hidden_rule.reference import agreeing, ambiguous, best_accuracy, identified, posterior
from icl_lib.paper.hidden_rule.task import (
    ANSWERS,
    FORMS,
    HELD_OUT,
    NEW_FORMS,
    NEW_RULES,
    PAIRS,
    RULES,
    VOCABULARY,
    Prompts,
    Rule,
    Vocabulary,
    sample_prompts,
)
from icl_lib.paper.hidden_rule.training import HiddenRuleSettings, HiddenRuleTrainer, build, losses, train_hidden_rule
from icl_lib.paper.hidden_rule.tuning import fine_tuned, gradient_cosines, measure_fine_tuned, measure_steered
