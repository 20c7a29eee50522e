r"""SymPy derives each statement of the book from what it assumes.

A derivation is not a formula that is typed in and then confirmed. Its result is solved for, and every formula that it
displays is an equation between SymPy expressions: a printer writes it, and :meth:`Derivation.check` proves it, with
sizes that stay symbols. :meth:`Derivation.lambdify` makes a function of arrays, and in a notebook a derivation shows
itself.

The identity:

- :func:`weight_update`: the edit of least norm that reproduces the pre-activation with the context
- :func:`solution_set`: all edits that do so
- :func:`uniqueness`: why no other is as small
- :func:`bias_update`: what a skip connection carries past the weights
- :func:`single_token_attention`: attention over one token

Every position, every block:

- :func:`position_weight_update`, :func:`position_bias_update`: a residual block, at any position of the sequence
- :func:`shared_factor`: why the updates of all positions add up to rank one
- :func:`alignment`: the cosine of two updates, of one block and of two
- :func:`hidden_permutation`: why the second of these depends on how hidden units are numbered

The blocks of today's language models:

- :func:`any_block`: what a block of any architecture needs
- :func:`output_update`, :func:`scale_update`, :func:`turning_update`, :func:`expert_updates`: ways to add a vector at
  the end of a block
- :func:`joint_weight_update`: one edit for several queries

Token by token:

- :func:`linear_losses`: the step of a token, the loss of which it is a gradient step, and the sum of all steps
- :func:`running_average`: what a token changes in the output of attention
- :func:`normalised_lms`, :func:`normalised_lms_heads`: a token of softmax attention is a step of normalised LMS
- :func:`eaten_from_left`: the context taken into the weights token by token, from the left

One edit for many queries:

- :func:`transfer_error`: what the edit of one query misses at another
- :func:`static_update`: the edit that is best on average over a sample of queries, and what it cannot serve
- :func:`least_squares_edit`: the same for any number of reads, with a ridge

Attention that is gradient descent by construction:

- :func:`gradient_descent_attention`: linear attention that makes a step on the regression in its context
- :func:`one_layer_optimum`: the layer with the least expected error
- :func:`merged_time_course`: how heads with merged keys and queries learn
- :func:`query_independent_update`: the one edit that replaces a prompt of linear attention for every query
- :func:`debiased_descent`: two heads of softmax attention with opposite signs, to first order

$a_0$ (``a_without``) is the output of the contextual layer without the removed part of the context, $a_C$ (``a_with``)
its output with it.

>>> from icl_lib.symbolic import weight_update
>>> derivation = weight_update()
>>> list(derivation.steps)[:4]
['lagrangian', 'stationarity', 'outer_product', 'constraint']
>>> derivation.check()
True
"""

from icl_lib.symbolic.alignment import alignment
from icl_lib.symbolic.any_block import any_block
from icl_lib.symbolic.bias_update import bias_update
from icl_lib.symbolic.debiased_descent import debiased_descent
from icl_lib.symbolic.derivation import Asked, Derivation, Equation, Given, Identity, Step
from icl_lib.symbolic.eaten_from_left import eaten_from_left
from icl_lib.symbolic.expert_updates import expert_updates
from icl_lib.symbolic.gradient_descent_attention import gradient_descent_attention
from icl_lib.symbolic.hidden_permutation import hidden_permutation
from icl_lib.symbolic.joint_weight_update import joint_weight_update
from icl_lib.symbolic.least_squares_edit import least_squares_edit
from icl_lib.symbolic.linear_losses import linear_losses
from icl_lib.symbolic.merged_time_course import merged_time_course
from icl_lib.symbolic.normalised_lms import normalised_lms
from icl_lib.symbolic.normalised_lms_heads import normalised_lms_heads
from icl_lib.symbolic.one_layer_optimum import one_layer_optimum
from icl_lib.symbolic.output_update import output_update
from icl_lib.symbolic.position_bias_update import position_bias_update
from icl_lib.symbolic.position_weight_update import position_weight_update
from icl_lib.symbolic.query_independent_update import query_independent_update
from icl_lib.symbolic.running_average import running_average
from icl_lib.symbolic.scale_update import scale_update
from icl_lib.symbolic.shared_factor import shared_factor
from icl_lib.symbolic.single_token_attention import single_token_attention
from icl_lib.symbolic.solution_set import solution_set
from icl_lib.symbolic.static_update import static_update
from icl_lib.symbolic.transfer_error import transfer_error
from icl_lib.symbolic.turning_update import turning_update
from icl_lib.symbolic.uniqueness import uniqueness
from icl_lib.symbolic.weight_update import weight_update

__all__ = [
    "Asked",
    "Derivation",
    "Equation",
    "Given",
    "Identity",
    "Step",
    "alignment",
    "any_block",
    "bias_update",
    "debiased_descent",
    "eaten_from_left",
    "expert_updates",
    "gradient_descent_attention",
    "hidden_permutation",
    "joint_weight_update",
    "least_squares_edit",
    "linear_losses",
    "merged_time_course",
    "normalised_lms",
    "normalised_lms_heads",
    "one_layer_optimum",
    "output_update",
    "position_bias_update",
    "position_weight_update",
    "query_independent_update",
    "running_average",
    "scale_update",
    "shared_factor",
    "single_token_attention",
    "solution_set",
    "static_update",
    "transfer_error",
    "turning_update",
    "uniqueness",
    "weight_update",
]
