"""The rank-one edit in the plane, with arrows to drag."""

from __future__ import annotations

import inspect
from typing import Any

import anywidget
import traitlets

from icl_lib.environment import building_book
from icl_lib.paper.figures import PLANE_EXAMPLE, plane_array, rank_one_picture
from icl_lib.widgets.page import STATIC, module, page_html


class PlaneArray(traitlets.TraitType):
    """Numbers of a fixed shape as nested lists. Takes tensors and arrays too; an error names what is wrong."""

    def validate(self, obj: Any, value: Any) -> Any:
        return plane_array(self.name, value).tolist()


class Playground(anywidget.AnyWidget):
    r"""The rank-one edit in the plane: drag the inputs of the layer, and $(W + \Delta W)\,a_0$ stays at $W a_C$.

    By mouse, touch or arrow keys, the reader moves ``a``, which is $a_0$, the input without the context, and
    ``a + d``, which is $a_C = a_0 + \delta$, the input with it, and the two columns of ``W``. The browser applies
    $W + \Delta W$ to $a_0$ and prints the distance to $W a_C$. With ``applied=False``, the negative control, it applies
    $W$ alone.

    With a kernel, the attributes ``W``, ``a``, ``d`` and ``applied`` change when the reader moves something, and
    ``observe`` reports it.

    Shapes: ``W`` ``[2, 2]``, ``a`` and ``d`` ``[2]``; lists, arrays or tensors. Raises `ValueError` for other shapes,
    for numbers that are not finite and for a zero ``a``. (A reader may drag $a_0$ to zero; a message then says that
    there is no such edit.)

    >>> playground = Playground(W=[[1, 0], [0, 2]], a=[1, 0], d=[0, 1])
    >>> playground.a, playground.applied
    ([1.0, 0.0], True)
    """

    _esm = module("playground")
    _css = STATIC / "widgets.css"

    W = PlaneArray().tag(sync=True)
    a = PlaneArray().tag(sync=True)
    d = PlaneArray().tag(sync=True)
    applied = traitlets.Bool(True).tag(sync=True)

    def __init__(
        self,
        W: Any = PLANE_EXAMPLE["W"],
        a: Any = PLANE_EXAMPLE["a"],
        d: Any = PLANE_EXAMPLE["d"],
        applied: bool = True,
    ) -> None:
        if not plane_array("a", a).any():
            raise ValueError("a is zero: the theorem needs a₀ ≠ 0. Give another a.")
        super().__init__(W=W, a=a, d=d, applied=applied)

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        bundle = super()._repr_mimebundle_(**kwargs)
        if building_book():
            state = {name: getattr(self, name) for name in ("W", "a", "d", "applied")}
            picture = rank_one_picture(self.W, self.a, self.d)._repr_html_() if any(self.a) else "<p>a₀ = 0</p>"
            bundle[0]["text/html"] = page_html("playground", state, picture)
        return bundle


Playground.__signature__ = inspect.Signature(  # the signature that traitlets gives every widget is (*args, **kwargs)
    list(inspect.signature(Playground.__init__).parameters.values())[1:]
)
