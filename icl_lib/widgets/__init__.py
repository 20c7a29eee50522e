"""Interactive pictures, for notebooks with a kernel and for the built pages without one.

:func:`explore` puts controls on any drawing function; :class:`Playground` shows the theorem in the plane, with arrows
to drag; :class:`AttentionHead` shows the steps of one head, token by token; :class:`Puzzle` runs the book's small
language model and moves its prompt into its weights.

What :func:`explore` shows was computed elsewhere. The others compute in the browser.
"""

from icl_lib.environment import extra

with extra("widgets"):
    from icl_lib.widgets.attention import AttentionHead
    from icl_lib.widgets.explorer import explore
    from icl_lib.widgets.playground import Playground
    from icl_lib.widgets.puzzle import Puzzle

__all__ = ["AttentionHead", "Playground", "Puzzle", "explore"]
