"""Things to move: alive in a notebook with a kernel, and on the built page without one.

:func:`explore` puts controls on any drawing function; :class:`Playground` is the theorem in the plane, to drag.

No mathematics here: what a widget shows was computed elsewhere, or is computed in front of the reader.
"""

from icl_lib.widgets.explorer import explore
from icl_lib.widgets.playground import Playground

__all__ = ["Playground", "explore"]
