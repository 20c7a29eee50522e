"""Interactive pictures, for notebooks with a kernel and for the built pages without one.

:func:`explore` puts controls on any drawing function; :class:`Playground` shows the theorem in the plane, with
arrows to drag.

A widget shows what was computed elsewhere; only the playground computes, with two-by-two matrices, in the browser.
"""

from icl_lib.environment import extra

with extra("widgets"):
    from icl_lib.widgets.explorer import explore
    from icl_lib.widgets.playground import Playground

__all__ = ["Playground", "explore"]
