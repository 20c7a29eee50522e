r"""Linear attention that is gradient descent by construction, and what one edit of the weights has to do with it.

- :func:`gradient_descent_attention`: a layer of linear self-attention that makes one step of gradient descent on the
  regression in its context; :func:`repeated` applies a layer to every token several times
- :func:`merged`, :func:`interpolated`: the same layer in two matrices, and layers between two of them
- :func:`train_linear_attention`: such a layer, trained on regression prompts; :func:`regression_prompts` draws these
- :func:`one_layer_optimum`, :func:`one_layer_loss`, :func:`best_rates`: the best layer, or layers, for Gaussian inputs;
  :func:`train_preconditioners` trains several
- :class:`LinearHeads`: heads with merged or separate keys and queries, which learn as :func:`merged_time_course` and
  :func:`plateau_losses` say
- :func:`context_matrix`, :func:`query_independent_update`: the matrix that a prompt is for linear attention, and the
  one edit that replaces the prompt for every query
- :class:`InterpolatedAttention`: between linear and softmax attention
- :class:`SoftmaxHeads`: heads of softmax attention that predict a number; :func:`train_softmax_heads`: such heads,
  trained on noisy regression (:func:`noisy_prompts`); :func:`head_patterns`: what each head has learned
- :func:`opposed_heads`: two heads of opposite signs, close to :func:`debiased_descent`; :func:`descent_loss`: the loss
  of one step at its best rate, in closed form
"""

from icl_lib.constructions.gradient_descent import (
    LinearSelfAttention,
    gradient_descent_attention,
    in_turn,
    interpolated,
    merged,
    repeated,
)
from icl_lib.constructions.key_query import (
    LinearHeads,
    cubic_features,
    cubic_mlp,
    descend,
    initial_strength,
    loss_on,
    merged_time_course,
    pauses,
    plateau_losses,
)
from icl_lib.constructions.preconditioning import (
    best_rates,
    descent_error,
    one_layer_loss,
    one_layer_optimum,
    rates_loss,
)
from icl_lib.constructions.query_independence import (
    InterpolatedAttention,
    context_matrix,
    query_independent_update,
)
from icl_lib.constructions.softmax_heads import (
    HeadPatterns,
    SoftmaxHeads,
    debiased_descent,
    descent_loss,
    head_patterns,
    noisy_prompts,
    opposed_heads,
    train_softmax_heads,
)
from icl_lib.constructions.training import (
    gaussian_prompts,
    regression_prompts,
    train_linear_attention,
    train_preconditioners,
)

__all__ = [
    "HeadPatterns",
    "InterpolatedAttention",
    "LinearHeads",
    "LinearSelfAttention",
    "SoftmaxHeads",
    "best_rates",
    "context_matrix",
    "cubic_features",
    "cubic_mlp",
    "debiased_descent",
    "descend",
    "descent_error",
    "descent_loss",
    "gaussian_prompts",
    "gradient_descent_attention",
    "head_patterns",
    "in_turn",
    "initial_strength",
    "interpolated",
    "loss_on",
    "merged",
    "merged_time_course",
    "noisy_prompts",
    "one_layer_loss",
    "one_layer_optimum",
    "opposed_heads",
    "pauses",
    "plateau_losses",
    "query_independent_update",
    "rates_loss",
    "regression_prompts",
    "repeated",
    "train_linear_attention",
    "train_preconditioners",
    "train_softmax_heads",
]
