r"""A pre-LN residual block at one position of the sequence, with the context and fed the query alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sympy as sp
from sympy.core.function import AppliedUndef

from icl_lib.symbolic.derivation import Derivation, Step, vanishes
from icl_lib.symbolic.least_norm import weight_update
from icl_lib.symbolic.normalization import layer_norm
from icl_lib.symbolic.notation import matrix, put, squared_norm, stacked, vector

LAYER_NORMS = ("symbol", "written out")
ACTIVATION = sp.Function(r"\sigma")

ALONE, ATTENDED, STREAM = r"\boldsymbol{A}_0", r"\boldsymbol{A}_i", r"\boldsymbol{s}_i"
READ_ALONE, READ = r"\boldsymbol{f}", r"\boldsymbol{g}_i"
NORM = r"\operatorname{LN}'"
EDITED = r"T_{W + \Delta W_i,\, b' + \Delta b'_i}(x)"


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    r"""The block $T = s + A + W' \sigma(W \operatorname{LN}'(s + A) + b) + b'$, in symbols.

    Attributes:
        least: the derivation of the smallest edit, whose $W$ is the block's.
        query: $x$, the residual stream of the query alone.
        alone: $A_0$, what attention gives to it.
        stream: $s_i$, the residual stream at position $i$.
        attended: $A_i$, what attention gives there with the context.
        read_alone: $f$, what the MLP reads from the query alone.
        read: $g_i$, what it reads at position $i$ with the context.
        outer_weight: $W'$.
        hidden_bias: $b$.
        bias: $b'$.
        norm: the symbols of $\operatorname{LN}'$ by name; none if it is any function.
    """

    least: Derivation
    query: sp.MatrixBase
    alone: sp.MatrixBase
    stream: sp.MatrixBase
    attended: sp.MatrixBase
    read_alone: sp.MatrixBase
    read: sp.MatrixBase
    outer_weight: sp.MatrixBase
    hidden_bias: sp.MatrixBase
    bias: sp.MatrixBase
    norm: dict[str, sp.MatrixBase]

    @property
    def weight(self) -> sp.MatrixBase:
        """The first weights of the MLP."""
        return self.least.arguments["W"]

    def as_read(self, expression: Any) -> Any:
        r"""Put what this MLP reads, $f$ and $g_i$, for the $a_0$ and $a_C$ of the weight update."""
        a0, aC = (self.least.arguments[name] for name in ("a_without", "a_with"))
        return put(expression, (a0, self.read_alone), (aC, self.read))

    def answer_alone(self, weight_edit: sp.MatrixBase, bias_edit: sp.MatrixBase) -> sp.MatrixBase:
        """What the edited block answers to the query alone."""
        now, _ = self.activation_reads(weight_edit)
        return self.query + self.alone + self.outer_weight * now.applyfunc(ACTIVATION) + self.bias + bias_edit

    def answer(self) -> sp.MatrixBase:
        """What the block answers at position i, with the context."""
        then = self.weight * self.read + self.hidden_bias
        return self.stream + self.attended + self.outer_weight * then.applyfunc(ACTIVATION) + self.bias

    def gap(self, weight_edit: sp.MatrixBase, bias_edit: sp.MatrixBase) -> sp.MatrixBase:
        """The one answer minus the other."""
        return self.answer_alone(weight_edit, bias_edit) - self.answer()

    def left_over(self, weight_edit: sp.MatrixBase, bias_edit: sp.MatrixBase) -> sp.MatrixBase:
        """The gap, once σ returns one and the same number wherever SymPy proves that it reads the same."""
        same = {
            ACTIVATION(now): ACTIVATION(then)
            for now, then in zip(*self.activation_reads(weight_edit), strict=True)
            if vanishes(self.named(now - then))
        }
        return self.gap(weight_edit, bias_edit).xreplace(same)

    def named(self, expression: Any) -> Any:
        r"""Give one name to each sum $A + s$, each applied function and each $1/\sqrt{v + \varepsilon}$.

        What is zero whatever the named numbers are is zero for these: SymPy may prove less of the short form, but
        nothing that is wrong, and it need not multiply out the norm's square roots.
        """
        sums = (vector("h", len(self.query), label) for label in ("0", "i"))
        short = put(expression, (self.alone, next(sums) - self.query), (self.attended, next(sums) - self.stream))
        numbers = short.atoms(AppliedUndef) | {power for power in short.atoms(sp.Pow) if power.exp == -sp.S.Half}
        return short.xreplace({number: sp.Dummy() for number in numbers})

    def activation_reads(self, weight_edit: sp.MatrixBase) -> tuple[sp.MatrixBase, sp.MatrixBase]:
        """What σ reads in the edited block, and what it read with the context."""
        now = (self.weight + weight_edit) * self.read_alone + self.hidden_bias
        return now, self.weight * self.read + self.hidden_bias

    def assumptions(self, weight_edit: sp.MatrixBase, bias_edit: sp.MatrixBase) -> tuple[Step, ...]:
        """The block, its norm, the effect that is asked for, and that there is something to read."""
        return (
            Step(
                "Block",
                self.answer(),
                stacked(
                    rf"T(C, x)_i = {STREAM} + {ATTENDED}",
                    rf"{{}} + W' \sigma(W {READ} + b) + b'",
                    rf"{READ} = {NORM}({ATTENDED} + {STREAM})",
                ),
                f"At position $i$ the residual stream is ${STREAM} = (C, x)_i$, attention adds ${ATTENDED}$ to it, and "
                "the MLP adds what it makes of both; $\\sigma$ is any function, applied to each entry.",
            ),
            self._norm_assumption(),
            Step(
                "Query alone",
                self.read_alone,
                rf"{READ_ALONE} = {NORM}({ALONE} + x)",
                f"Without the context the stream is the query $x$, attention adds ${ALONE}$, and the MLP reads "
                f"${READ_ALONE}$.",
            ),
            Step(
                "Effect",
                sp.Eq(self.answer_alone(weight_edit, bias_edit), self.answer()),
                rf"{EDITED} = T(C, x)_i",
                "The edited block shall answer to the query alone as the block answered at position $i$ with the "
                "context, whatever $\\sigma$, $W'$ and the biases are.",
            ),
            Step(
                "Something to read",
                sp.Ne(squared_norm(self.read_alone), 0),
                rf"{READ_ALONE} \neq \boldsymbol{{0}}",
                f"If ${READ_ALONE}$ were zero, no edit of the weights could change the answer to it.",
            ),
        )

    def _norm_assumption(self) -> Step:
        if self.norm:
            return Step(
                "Norm",
                self.read,
                rf"{NORM}(h)_k = \gamma_k \frac{{h_k - m}}{{\sqrt{{v + \varepsilon}}}} + \beta_k",
                "The norm is `layer_norm`, with $m$ the mean and $v$ the variance of the vector $h$ that it reads, and "
                "$v + \\varepsilon \\neq 0$.",
            )
        size = len(self.query)
        entries = [f"h_{k + 1}" for k in range(size)] if size < 4 else ["h_1", r"\dots", f"h_{{{size}}}"]
        return Step(
            "Norm",
            self.read,
            rf"{NORM}(h)_k = {NORM}_k({', '.join(entries)})",
            "The norm before the MLP may be any function of all entries: layer norm is one, and so is none at all.",
        )


@lru_cache(maxsize=None, typed=True)
def residual_block(out_features: int, in_features: int, norm: str) -> ResidualBlock:
    """Return the block, with the norm before its MLP any function or written out.

    Raises `ValueError` for another norm, under the name that it has in the derivations, ``layer_norm``.
    """
    least = weight_update(out_features, in_features)
    if norm not in LAYER_NORMS:
        raise ValueError(f"layer_norm={norm!r} is unknown: use 'symbol' or 'written out'")
    x, s = vector("x", in_features), vector("s", in_features, "i")
    alone, attended = vector("A", in_features, "0"), vector("A", in_features, "i")

    written = layer_norm(in_features)
    names = ("gain", "shift", "eps") if norm == "written out" else ()

    def normed(h: sp.MatrixBase) -> sp.MatrixBase:
        if names:
            return put(written.result, (written.arguments["x"], h))
        # Each entry is a function of all entries, so nothing is assumed of how the norm mixes them.
        return sp.ImmutableMatrix([sp.Function(f"LN'_{{{k + 1}}}", real=True)(*h) for k in range(in_features)])

    return ResidualBlock(
        least=least,
        query=x,
        alone=alone,
        stream=s,
        attended=attended,
        read_alone=normed(alone + x),
        read=normed(attended + s),
        outer_weight=matrix("W'", in_features, out_features),
        hidden_bias=vector("b", out_features),
        bias=vector("b'", in_features),
        norm={name: written.arguments[name] for name in names},
    )
