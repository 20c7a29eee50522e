r"""The edits of the experts of a mixture, which add their outputs with weights."""

from __future__ import annotations

from functools import cache

import sympy as sp

from icl_lib.symbolic.derivation import Asked, Derivation, Identity, Nonzero, Step, is_least, rewritten, total
from icl_lib.symbolic.notation import latex, matrix, number, squared_norm, vector
from icl_lib.symbolic.output_update import output_update

EXPERTS = 3
"""The sums over experts are proved for three."""


@cache
def expert_updates() -> Derivation:
    r"""Derive the edit of each active expert's last map when the experts' outputs are added with gates.

    $$\Delta W_e = \frac{1}{\sum_{e'} p_{e'}} \frac{\Delta h\, y_e^\top}{\|y_e\|^2}, \qquad
    \sum_e p_e (W_e + \Delta W_e)\, y_e = \sum_e p_e W_e\, y_e + \Delta h$$

    The router has its weight update (:func:`~icl_lib.symbolic.any_block`), so the gates $p_e$ and the active experts
    are those of the prompt. Each active expert adds the same vector $\Delta h / \sum p_e$, by its
    :func:`~icl_lib.symbolic.output_update`.

    Source: Goldwaser et al. (arXiv 2511.17864), mixture of experts.

    Shapes: the result, $\Delta W_e$, is a function of ``change`` $\Delta h$ ``[out]``, ``hidden`` $y_e$ ``[in]`` and
    ``total`` $\sum p_e$, an array without dimensions.

    >>> import numpy as np
    >>> derivation = expert_updates()
    >>> derivation.check()
    True
    >>> derivation.lambdify()(np.array([1.0, 2.0]), np.array([0.0, 2.0]), np.array(0.5))
    array([[0., 1.],
           [0., 2.]])
    """
    output = output_update()
    own_change, own_hidden = output.arguments.values()
    W, edit, y, gate = matrix("W_e"), matrix(r"\Delta W_e"), vector("y", index="e"), number("p_e")
    change, all_gates = own_change, sp.Symbol("p", positive=True)
    share = output.result.xreplace({own_change: change / all_gates, own_hidden: y})
    update = rewritten(share, change * y.T / (all_gates * squared_norm(y)))

    instances = []
    gates = [sp.Symbol(f"p_{k}", positive=True) for k in range(1, EXPERTS + 1)]
    for k, own_gate in enumerate(gates, start=1):
        read = vector("y", index=str(k))
        own_edit = update.xreplace({y: read, all_gates: sp.Add(*gates)})
        instances.append({W: matrix(f"W_{k}"), edit: own_edit, y: read, gate: own_gate})
    sum_of_gates, gates_added = total(r"\sum_e", gate, tuple(instances))
    edited, edited_value = total(r"\sum_e", gate * (W + edit) * y, tuple(instances))
    before, before_value = total(r"\sum_e", gate * W * y, tuple(instances))

    return Derivation(
        name="expert_updates",
        source="Goldwaser et al. 2026 (arXiv 2511.17864), mixture of experts",
        assumptions=dict(
            gates=Step(
                "**Gates.** The router is patched, so the gates are those of the prompt. Their sum need not be one.",
                Identity(all_gates, sum_of_gates),
            ),
            nonzero=Step(
                "**Nonzero activations.** Every active expert has something to act on.", Nonzero(y), Nonzero(all_gates)
            ),
        ),
        steps=dict(
            share=Step(
                f"**An equal share for each.** Expert $e$ adds ${latex(change / all_gates)}$ by its `output_update`.",
                Asked(edit, update),
                Asked(edit * y, change / all_gates),
            ),
            sum=Step(
                "**The gated sum.** The shares, weighted with the gates, add up to the change.",
                Identity(edited, before + change),
            ),
        ),
        unknown=edit,
        result=update,
        statement=Asked(edit, change * y.T / (all_gates * squared_norm(y))),
        arguments={"change": change, "hidden": y, "total": all_gates},
        names={sum_of_gates: gates_added, all_gates: gates_added, edited: edited_value, before: before_value},
        beyond=lambda candidate: (is_least(candidate, y),),
    )
