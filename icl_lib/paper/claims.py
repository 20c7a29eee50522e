"""A claim of the book: a number that a chapter computes, its bound, and a control that must break the bound."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from typing import Any

from icl_lib.environment import building_book, extra
from icl_lib.measures import TIMES, scientific

GLUE = "claim:"
"""How the names begin under which a notebook keeps its claims, among what it has glued."""
_HOLDS = {"≤": operator.le, "≥": operator.ge, "=": operator.eq}
_OPPOSITE = {"≤": "≥", "≥": "≤"}
_BROKEN = {"≤": ">", "≥": "<", "=": "≠"}
Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that was checked: ``value relation bound``, for example 7e-16 ≤ 1e-12, and its negative control."""

    name: str
    value: bool | int | float | str
    relation: str
    bound: bool | int | float | str
    control: bool | int | float | str | None = None
    control_bound: float | None = None
    without_control: str = ""

    @property
    def result(self) -> str:
        """The number and its bound, as text.

        >>> print(Claim("a", 7.2e-16, "≤", 1e-12, 0.84).result)
        7.2 × 10⁻¹⁶ ≤ 10⁻¹²
        """
        return _compared(self.value, self.relation, self.bound)

    @property
    def control_result(self) -> str:
        """The control's number and the bound that it breaks or must reach, as text; or why there is no control.

        >>> print(Claim("a", 7.2e-16, "≤", 1e-12, 0.84).control_result)
        0.84 > 10⁻¹²
        """
        if self.without_control:
            return f"none: {self.without_control}"
        if self.control_bound is not None:
            return _compared(self.control, _OPPOSITE[self.relation], self.control_bound)
        return _compared(self.control, _BROKEN[self.relation], self.bound)

    def __str__(self) -> str:
        return f"✓ {self.name}: {self.result}; control: {self.control_result}"


def claim(
    name: str,
    value: Any,
    *,
    at_most: float | int | None = None,
    at_least: float | int | None = None,
    equals: bool | int | float | str | None = None,
    control: Any = None,
    beyond: float | int | None = None,
    without_control: str = "",
) -> None:
    """Check a claim of the book where a chapter computes its number, and keep the numbers for the page of claims.

    The same bound is put to ``control``, a number for which the statement must be false: a block without its edit, an
    untrained network, shuffled data. A control that keeps the bound is an error too, since the check could then not
    fail. A condition is a claim without a bound: ``claim(name, derivation.check(), control=wrong.check())``.

    >>> claim("weight-update", 7.2e-16, at_most=1e-12, control=0.84, beyond=1e-2)
    ✓ weight-update: 7.2 × 10⁻¹⁶ ≤ 10⁻¹²; control: 0.84 ≥ 0.01
    >>> claim("weight-update", 7.2e-16, at_most=1e-12, control=3e-15)
    Traceback (most recent call last):
    AssertionError: weight-update: the control is 3 × 10⁻¹⁵ ≤ 10⁻¹², so the check cannot fail.

    Args:
        name: the claim's name in ``book/claims.md``; words of small letters and digits, joined by hyphens.
        value: a number, a tensor with a single number, a text or a condition.
        at_most, at_least, equals: the bound, one of them; none for a condition, which must hold.
        control: the number for the case in which the statement must be false.
        beyond: a bound for the control, farther off than that of the value: `at_least` where that is `at_most`.
        without_control: the reason why there is no control, in a few words.

    Raises:
        AssertionError: the value breaks its bound or is not finite, or the control keeps it.
        ValueError: an argument is missing, or a bound cannot be broken.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(f"name is {name!r}: give words of small letters and digits, joined by hyphens.")
    value, control = _plain("value", value), None if control is None else _plain("control", control)
    bounds = {"≤": at_most, "≥": at_least, "=": equals}
    given = {relation: bound for relation, bound in bounds.items() if bound is not None}
    if isinstance(value, bool) and not given:
        given = {"=": True}
    if len(given) != 1:
        raise ValueError(f"{name} has {len(given)} bounds: give one of at_most, at_least and equals.")
    [(relation, bound)] = given.items()
    if beyond is not None and control is None:
        raise ValueError(f"{name} has beyond, but no control: give a control, or leave it out.")
    if (control is None) == (not without_control):
        raise ValueError(f"{name}: give a control, or else say in without_control why there is none.")
    _require_breakable(name, relation, bound, beyond)
    checked = Claim(name, value, relation, bound, control, beyond, without_control)
    if not _HOLDS[relation](value, bound):
        raise AssertionError(f"{name} does not hold: {_compared(value, _BROKEN[relation], bound)}.")
    if control is not None and _HOLDS[relation](control, bound):
        raise AssertionError(f"{name}: the control is {_compared(control, relation, bound)}, so the check cannot fail.")
    if beyond is not None and not _HOLDS[_OPPOSITE[relation]](control, beyond):
        raise AssertionError(f"{name}: the control is {_compared(control, _BROKEN[_OPPOSITE[relation]], beyond)}.")
    _show(checked)


def claim_derivation(derivation: Any) -> None:
    """Claim that a derivation proves what it displays. The control is the same derivation with twice its result.

    The claim has the name of the derivation, with hyphens, as its statement in the book.
    """
    wrong = dataclasses.replace(derivation, result=2 * derivation.result)
    claim(derivation.name.replace("_", "-"), derivation.check(), control=wrong.check())


def _plain(argument: str, value: Any) -> Value:
    """The value as JSON can hold it; the single number of a tensor."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, bool | int | float | str):
        raise ValueError(f"{argument} is a {type(value).__name__}: give a number, a text or a condition.")
    if isinstance(value, float) and not math.isfinite(value):
        raise AssertionError(f"{argument} is {value}, which is no measurement.")
    return value


def _require_breakable(name: str, relation: str, bound: Value, beyond: float | None) -> None:
    if isinstance(bound, float) and not math.isfinite(bound):
        raise ValueError(f"{name} has the bound {bound}, which no number can break: give a finite number.")
    if beyond is not None and (relation == "=" or not _HOLDS[_OPPOSITE[relation]](beyond, bound)):
        raise ValueError(
            f"{name} has beyond={beyond}, which is not beyond {relation} {bound}: the control may keep it."
        )


def _written(value: Value | None) -> str:
    if isinstance(value, bool):
        return "holds" if value else "does not hold"
    if isinstance(value, str):
        return value
    if isinstance(value, int) and abs(value) < 100_000:
        return str(value).replace("-", "−")
    number, times, power = scientific(value, 3 if 1e-3 <= abs(value) < 1e5 else 2).partition(TIMES)
    number = number.rstrip("0").rstrip(".") if "." in number else number
    return number.removesuffix("1") + power if number in ("1", "−1") and power else f"{number}{times}{power}"


def _compared(value: Value | None, relation: str, bound: Value | None) -> str:
    if isinstance(bound, bool) or relation == "=":
        return _written(value)
    return f"{_written(value)} {relation} {_written(bound)}"


def _show(checked: Claim) -> None:
    """Show the claim. The build of the book only keeps it, as MyST-NB's ``glue`` keeps what it is given."""
    with extra("widgets"):
        from IPython import get_ipython
        from IPython.display import display

    if get_ipython() is None:
        print(checked)
        return
    prefix = "application/papermill.record/" if building_book() else ""
    metadata = {
        "scrapbook": {"name": f"{GLUE}{checked.name}", "mime_prefix": prefix},
        "claim": dataclasses.asdict(checked),
    }
    display({f"{prefix}text/plain": str(checked)}, raw=True, metadata=metadata)
