r"""SymPy derives each statement of the book from what it assumes.

A derivation is not a formula that is typed in and then confirmed. Its assumptions are SymPy objects, its steps are what
SymPy makes of them, and its result is what comes out. :meth:`Derivation.check` puts the result back into the
assumptions, :meth:`Derivation.lambdify` makes it a function of arrays, and in a notebook a derivation shows itself.

- :func:`weight_update`: the smallest edit of the weights that has the effect of the context
- :func:`weight_update_any_size`: the same, with sizes that stay symbols
- :func:`solution_set`: all edits with that effect
- :func:`uniqueness`: why no other is as small
- :func:`bias_update`: what a skip connection carries past the weights
- :func:`single_token_attention`: attention over one token
- :func:`layer_norm`: layer norm, written out
- :func:`position_weight_update`, :func:`position_bias_update`: a residual block, at any position of the sequence
- :func:`shared_factor`: why the updates of all positions add up to rank one
- :func:`alignment_within`, :func:`alignment_across`: the cosine of two updates, of one block and of two
- :func:`hidden_permutation`: why the second of these depends on how hidden units are numbered
- :func:`gradient_step`: what one more token adds to the weights, and the loss of which this is a gradient step
- :func:`telescoping`: these steps add up to the weight update, for any number of tokens
- :func:`eating_step`, :func:`eaten_from_left`: the context removed token by token, from the left
- :func:`softmax_recursion`, :func:`average_recursion`: what a token changes in what attention reads
- :func:`normalised_lms`, :func:`normalised_lms_heads`: a token of softmax attention is a step of normalised LMS

$a_0$ (``a_without``) is what the contextual layer yields without the removed part of the context, $a_C$ (``a_with``)
what it yields with it, and $\delta = a_C - a_0$.

Sources: Dherin, Munn, Mazzawi, Wunder, Gonzalvo, *Learning without training* (arXiv 2507.16003); Innocenti, Achour,
*A Simple Generalisation of the Implicit Dynamics of In-Context Learning* (arXiv 2512.11255).

>>> from icl_lib.symbolic import weight_update
>>> derivation = weight_update(3, 2)
>>> [step.name for step in derivation.steps][:4]
['Lagrangian', 'Stationarity', 'Outer product', 'Rank one']
>>> derivation.check()
True
"""

from icl_lib.symbolic.alignment import alignment_across, alignment_within
from icl_lib.symbolic.any_size import weight_update_any_size
from icl_lib.symbolic.attention import single_token_attention
from icl_lib.symbolic.averaging import average_recursion
from icl_lib.symbolic.derivation import Derivation, Step
from icl_lib.symbolic.eating import eating_step
from icl_lib.symbolic.every_position import position_bias_update, position_weight_update
from icl_lib.symbolic.from_left import eaten_from_left
from icl_lib.symbolic.hidden_units import hidden_permutation
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.lms import normalised_lms
from icl_lib.symbolic.lms_heads import normalised_lms_heads
from icl_lib.symbolic.normalization import layer_norm
from icl_lib.symbolic.recursion import softmax_recursion
from icl_lib.symbolic.skip_connection import bias_update
from icl_lib.symbolic.solutions import solution_set, uniqueness
from icl_lib.symbolic.stacked import shared_factor
from icl_lib.symbolic.sum_of_steps import telescoping
from icl_lib.symbolic.token_step import gradient_step

__all__ = [
    "Derivation",
    "Step",
    "alignment_across",
    "alignment_within",
    "average_recursion",
    "bias_update",
    "eaten_from_left",
    "eating_step",
    "gradient_step",
    "hidden_permutation",
    "layer_norm",
    "normalised_lms",
    "normalised_lms_heads",
    "position_bias_update",
    "position_weight_update",
    "shared_factor",
    "single_token_attention",
    "softmax_recursion",
    "solution_set",
    "telescoping",
    "uniqueness",
    "weight_update",
    "weight_update_any_size",
]
