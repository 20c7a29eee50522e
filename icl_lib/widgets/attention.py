"""One attention head over tokens in the plane, with tokens to drag, and the edits that they make one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import anywidget
import torch
import traitlets
from torch import nn

from icl_lib.blocks.block import ContextualBlock
from icl_lib.blocks.contextual import SoftmaxAttention
from icl_lib.environment import building_book
from icl_lib.paper.figures import PLANE_EXAMPLE, plane_array, rank_one_picture
from icl_lib.widgets.page import STATIC, module, page_html
from icl_lib.widgets.playground import PlaneArray

MOST_TOKENS = 8
STATE = ("W", "tokens", "query", "other", "uniform")


class _Tokens(traitlets.TraitType):
    """One to `MOST_TOKENS` pairs of numbers, as nested lists."""

    def validate(self, obj: Any, value: Any) -> Any:
        given = list(value) if isinstance(value, Sequence) or hasattr(value, "shape") else []
        if not 1 <= len(given) <= MOST_TOKENS:
            raise ValueError(f"{self.name} is {value!r}: give 1 to {MOST_TOKENS} pairs of numbers.")
        return [plane_array(f"{self.name}[{i}]", token).tolist() for i, token in enumerate(given)]


class AttentionHead(anywidget.AnyWidget):
    r"""One head of softmax attention over tokens in the plane, and the steps by which they make the weight update.

    Keys, queries and values are the tokens themselves: $\alpha_i \propto \exp(\langle c_i, x \rangle / \sqrt 2)$, the
    query among the tokens, and $a_0 = x$. The reader drags, adds and removes tokens by mouse, touch or keyboard. The
    browser shows $\alpha$, $A(C, x)$, $\Delta W$, and for each token its step of normalised LMS and its loss
    (:func:`icl_lib.dynamics.normalised_lms`). The negative control is another query, ``other``: the edit is not made
    for it.

    With a kernel, the attributes change when the reader moves something, and ``observe`` reports it.

    Args:
        W: ``[2, 2]``, the layer after the attention.
        tokens: ``[n, 2]``, with one to eight tokens.
        query: ``[2]``, not zero.
        other: ``[2]``, the query of the control.
        uniform: whether all tokens get the same weight, whatever they are.

    Raises `ValueError` for other shapes, for numbers that are not finite and for a zero ``query``.

    >>> head = AttentionHead(tokens=[[1, 2], [0, 1]])
    >>> tokens, query = (torch.tensor(value, dtype=torch.float64) for value in (head.tokens, head.query))
    >>> head.block()(tokens, query).shape
    torch.Size([2])
    """

    _esm = module("attention")
    _css = STATIC / "widgets.css"

    W = PlaneArray().tag(sync=True)
    tokens = _Tokens().tag(sync=True)
    query = PlaneArray().tag(sync=True)
    other = PlaneArray().tag(sync=True)
    uniform = traitlets.Bool(False).tag(sync=True)

    def __init__(
        self,
        W: Any = PLANE_EXAMPLE["W"],
        tokens: Any = ((1.4, -2.2), (-1.6, 2.2), (2.4, 1.6)),
        query: Any = (1.1, 0.5),
        other: Any = (-1.2, -1.0),
        uniform: bool = False,
    ) -> None:
        if not plane_array("query", query).any():
            raise ValueError("query is zero: the theorem needs a₀ ≠ 0, and here a₀ is the query. Give another query.")
        super().__init__(W=W, tokens=tokens, query=query, other=other, uniform=uniform)

    def block(self) -> ContextualBlock:
        """The same head and layer as a block of the library, in float64."""
        layer, linear = SoftmaxAttention(dim=2), nn.Linear(2, 2, bias=False)
        for projection in (layer.query, layer.key, layer.value, layer.output):
            nn.init.eye_(projection.weight)
        if self.uniform:
            nn.init.zeros_(layer.query.weight)
        block = ContextualBlock(layer, linear).double().requires_grad_(False)
        linear.weight.copy_(torch.tensor(self.W, dtype=torch.float64))
        return block

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if building_book():
            tokens, query = (torch.tensor(value, dtype=torch.float64) for value in (self.tokens, self.query))
            change = self.block().contextual(tokens, query) - query
            picture = rank_one_picture(self.W, query, change)._repr_html_() if any(self.query) else "<p>x = 0</p>"
            bundle[0]["text/html"] = page_html("attention", {name: getattr(self, name) for name in STATE}, picture)
        return bundle


AttentionHead.__signature__ = inspect.Signature(  # the signature that traitlets gives every widget is (*args, **kwargs)
    list(inspect.signature(AttentionHead.__init__).parameters.values())[1:]
)
