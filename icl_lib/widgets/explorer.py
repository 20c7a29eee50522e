"""One call that puts controls on a drawing function."""

from __future__ import annotations

import base64
import html
import inspect
import itertools
import json
import math
import numbers
import traceback
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets
from matplotlib.figure import Figure as MatplotlibFigure

from icl_lib.environment import building_book
from icl_lib.paper.figures import Figure
from icl_lib.widgets.page import Page, page_html

MAX_FRAMES = 200
MAX_PAGE_BYTES = 150_000
"""The most that one :func:`explore` may add to a page, where every combination of its controls is drawn in advance."""


def explore(
    draw: Any,
    /,
    *,
    initial: Any = None,
    labels: Any = None,
    **controls: Any,
) -> Any:
    """Put controls on a drawing function: ``explore(draw, k=range(1, 9), trained=[False, True])``.

    With a kernel, moving a control calls ``draw`` again. While the book is built, ``draw`` is called once for every
    combination of values, and the page gets the same controls with these frames. They are compressed together: frames
    of one drawing differ in little. A page also shows the values under the pointer, plays the first slider, and keeps
    the controls in its address, so that a figure can be linked in one state.

    Args:
        draw: called as ``draw(k=3, trained=False)``. Returns a :class:`~icl_lib.paper.figures.Figure`, a matplotlib
            figure, anything with ``_repr_html_`` or ``_repr_latex_``, a string, a number, or a list of these.
        initial: the values to start from, by name; otherwise the first of each control.
        labels: what to call a control, by name; otherwise its name, with spaces for underscores.
        controls: the values of each argument of ``draw``. A ``range``, list, tuple or one-dimensional array of numbers
            becomes a slider. A list of strings, or a dictionary from labels to values, becomes buttons or a menu.
            ``[False, True]`` becomes a checkbox.

    Returns:
        An object to end a cell with: an ``ipywidgets.VBox`` where there is a kernel, HTML while the book is built.

    Raises:
        ValueError: for a control that is empty, not finite or not an argument of ``draw``, for an ``initial`` value
            that is not among the values, for more combinations than `MAX_FRAMES`, and for a result of ``draw`` that
            cannot be shown. The message names the control and its value.

    >>> view = explore(lambda k: f"k squared is {k**2}", k=range(4))
    >>> [type(child).__name__ for child in view.children]
    ['SelectionSlider', 'Output']
    """
    if not callable(draw):
        raise ValueError(f"draw is a {type(draw).__name__}: give a function that returns a picture for given values.")
    if not controls:
        raise ValueError("explore has no controls: give the values of draw's arguments, for example k=range(5).")
    initial, labels = ({} if option is None else option for option in (initial, labels))
    for given, option in (("initial", initial), ("labels", labels)):
        if not isinstance(option, Mapping):
            raise ValueError(f"{given} is {option!r}: give a dictionary by the names of the controls.")
        for name in option:
            if name not in controls:
                raise ValueError(f"{given}[{name!r}] names no control: the controls are {', '.join(controls)}.")
    parsed = [
        _Control.of(name, values, str(labels.get(name, name.replace("_", " ")))) for name, values in controls.items()
    ]
    _require_arguments(draw, parsed)
    start = [control.place(initial[control.name]) if control.name in initial else control.at for control in parsed]
    frames = math.prod(len(control.values) for control in parsed)
    if frames > MAX_FRAMES:
        sizes = " × ".join(f"{control.name}: {len(control.values)}" for control in parsed)
        raise ValueError(
            f"these controls have {frames} frames ({sizes}), more than {MAX_FRAMES}: give some controls fewer values."
        )
    return (_frames if building_book() else _live)(draw, parsed, start)


@dataclass(frozen=True)
class _Control:
    """One control: its values, and what the reader sees for each."""

    name: str
    label: str
    kind: str  # "slider", "choice" or "checkbox"
    texts: list[str]
    values: list[Any]
    at: int = 0  # the place of the value to start from

    @classmethod
    def of(cls, name: str, given: Any, label: str) -> _Control:
        if isinstance(given, Mapping):
            texts, values, kind = [str(text) for text in given], list(given.values()), "choice"
        elif isinstance(given, (str, bytes, set, frozenset)) or not isinstance(given, Iterable):
            raise ValueError(f"{name} is {given!r}: give a list, a range, an array, or a dictionary of its values.")
        else:
            if len(getattr(given, "shape", [None])) != 1:
                raise ValueError(f"{name} has shape {tuple(given.shape)}: give an array with one dimension.")
            # One value more than the limit is enough to see that there are too many; the iterable may be endless.
            first = list(itertools.islice(given, MAX_FRAMES + 1))
            values = [value.item() if hasattr(value, "item") else value for value in first]  # Python's own numbers
            for i, value in enumerate(values):
                if not isinstance(value, (str, bool, numbers.Real)):
                    raise ValueError(f"{name}[{i}] is {value!r}: give numbers or strings, or a dictionary with labels.")
                if isinstance(value, float) and not math.isfinite(value):
                    raise ValueError(f"{name}[{i}] is {value}: give finite numbers, or a dictionary with labels.")
            texts = [_text(value) for value in values]
            if len(set(texts)) < len(texts):
                texts = [str(value) for value in values]
            if values in ([False, True], [True, False]) and all(isinstance(value, bool) for value in values):
                return cls(name, label, "checkbox", ["False", "True"], [False, True], int(values[0]))
            kind = "choice" if all(isinstance(value, (str, bool)) for value in values) else "slider"
        if not values:
            raise ValueError(f"{name} is empty: give at least one value.")
        twice = [text for i, text in enumerate(texts) if text in texts[:i]]
        if twice:
            raise ValueError(f"{name} has {twice[0]} twice: give each value once.")
        return cls(name, label, kind, texts, values)

    def place(self, value: Any) -> int:
        """The index of a value, or of its label."""
        text = _text(value)
        for i in range(len(self.values)):
            if self.values[i] is value or self.texts[i] == text:
                return i
        raise ValueError(f"initial[{self.name!r}] is {value!r}: choose one of {', '.join(self.texts)}.")


def _text(value: Any) -> str:
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)


def _require_arguments(draw: Any, controls: list[_Control]) -> None:
    try:
        signature = inspect.signature(draw)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    try:
        signature.bind(**{control.name: None for control in controls})
    except TypeError as error:
        given = ", ".join(control.name for control in controls)
        raise ValueError(
            f"draw{signature} cannot be called with the controls {given}: {error}. "
            "Give one control for each of its arguments, under the same name."
        ) from None


def _drawn(draw: Any, controls: list[_Control], at: Iterable[int]) -> str:
    """The HTML of ``draw`` at one combination of the controls' values."""
    at = list(at)
    where = ", ".join(f"{control.label} = {control.texts[i]}" for control, i in zip(controls, at, strict=True))
    values = {control.name: control.values[i] for control, i in zip(controls, at, strict=True)}
    try:
        result = draw(**values)
    except Exception as error:
        raise RuntimeError(f"draw failed at {where}") from error
    return _shown(result, where)


def _shown(value: Any, where: str) -> str:
    if isinstance(value, (list, tuple)) and value:
        return "".join(_shown(part, where) for part in value)
    if isinstance(value, MatplotlibFigure):
        value = Figure(value, alt=where)
    text = getattr(value, "_repr_html_", lambda: None)()
    if text is not None:
        if building_book() and "<script" in text.lower():
            raise ValueError(
                f"draw returned a {type(value).__name__} for {where}, which draws itself by a script: on a page "
                "without a kernel its frames would stay blank. Return a Figure, a matplotlib "
                "figure, or HTML without scripts."
            )
        return text
    text = getattr(value, "_repr_latex_", lambda: None)()
    if text is not None:
        return rf'<div class="math notranslate nohighlight">\[{html.escape(text.strip("$"))}\]</div>'
    if isinstance(value, (str, numbers.Number)):
        return f'<p style="white-space:pre-wrap">{html.escape(str(value))}</p>'
    raise ValueError(
        f"draw returned {type(value).__name__} for {where}: return a Figure, a matplotlib figure, a string, or an "
        "object with _repr_html_ or _repr_latex_."
    )


def _live(draw: Any, controls: list[_Control], start: list[int]) -> ipywidgets.VBox:
    output = ipywidgets.Output()
    inputs = [_input(control, at) for control, at in zip(controls, start, strict=True)]

    def redraw() -> None:
        text = _drawn(draw, controls, [int(control.value) for control in inputs])
        output.outputs = ({"output_type": "display_data", "data": {"text/html": text}, "metadata": {}},)

    def moved(_: Any) -> None:
        try:
            redraw()
        except Exception as error:  # this runs outside any cell, so no cell would show it
            lines = traceback.format_exception(error)
            error_output = {"output_type": "error", "ename": type(error).__name__, "evalue": str(error)}
            output.outputs = ({**error_output, "traceback": lines},)

    for control in inputs:
        control.observe(moved, names="value")
    redraw()
    return ipywidgets.VBox([*inputs, output])


def _input(control: _Control, at: int) -> ipywidgets.ValueWidget:
    """The ipywidget of a control; its value is the index of the control's value."""
    if control.kind == "checkbox":
        return ipywidgets.Checkbox(value=bool(at), description=control.label, indent=False)
    kinds = {"slider": ipywidgets.SelectionSlider, "choice": ipywidgets.Dropdown}
    if control.kind == "choice" and len(control.texts) <= 4:
        kinds["choice"] = ipywidgets.ToggleButtons
    options = [(text, i) for i, text in enumerate(control.texts)]
    style = {"description_width": "initial"}
    return kinds[control.kind](options=options, value=at, description=control.label, style=style)


def _frames(draw: Any, controls: list[_Control], start: list[int]) -> Page:
    frames: dict[str, int] = {}  # equal frames are kept once
    places = list(itertools.product(*(range(len(control.values)) for control in controls)))
    order = [frames.setdefault(_drawn(draw, controls, at), len(frames)) for at in places]
    first = list(frames)[order[places.index(tuple(start))]]
    state = {
        "controls": [
            {"name": control.name, "label": control.label, "kind": control.kind, "options": control.texts, "at": at}
            for control, at in zip(controls, start, strict=True)
        ],
        "frames": _packed([None if text == first else text for text in frames]),
        "order": order,
    }
    page = page_html("explore", state, f'<div class="icl-explore"><div class="icl-frame">{first}</div></div>')
    size = len(page.encode())
    if size > MAX_PAGE_BYTES:
        raise ValueError(
            f"{len(order)} frames take {size / 1e3:.0f} kB of the page, at most {MAX_PAGE_BYTES / 1e3:.0f} kB: give "
            "some controls fewer values, or draw fewer points in a frame."
        )
    return Page(page)


def _packed(frames: list[str | None]) -> str | list[str | None]:
    """The frames as compressed JSON, in base64; as they are where the build has still to set their formulas."""
    if any('class="math' in (frame or "") for frame in frames):
        return frames
    return base64.b64encode(zlib.compress(json.dumps(frames, ensure_ascii=False).encode(), 9)).decode()
