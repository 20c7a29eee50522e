"""How numbers are compared and written."""

import math
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icl_lib.measures import TIMES, at_most, relative_error, scientific


def test_relative_error_is_taken_vector_by_vector():
    expected = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    actual = torch.tensor([[3.0, 9.0], [0.0, 0.0], [1.0, 0.0]])
    assert relative_error(actual, expected).tolist() == [1.0, 0.0, math.inf]


def test_half_precision_does_not_overflow():
    large = torch.full((4,), 6e4, dtype=torch.float16)
    assert relative_error(0 * large, large) == 1


def read(text):
    mantissa, _, exponent = text.replace("−", "-").partition(TIMES + "10")
    return float(mantissa) * 10 ** int(exponent.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


@given(st.floats(1e-300, 1e300), st.integers(1, 4))
def test_a_number_is_written_to_its_digits_and_a_bound_is_never_below_it(value, digits):
    assert read(scientific(value, digits)) == pytest.approx(value, rel=0.5 * 10 ** (1 - digits) * 1.01)
    assert value * (1 - 1e-14) <= read(at_most(value, digits)) <= value * (1 + 10 ** (1 - digits)) * (1 + 1e-14)


@pytest.mark.parametrize("write", [scientific, at_most])
def test_a_number_is_not_broken_at_the_end_of_a_line(write):
    for text in (write(2e-16), write(-3e7)):
        assert textwrap.wrap(text, 3, break_long_words=False) == [text]
        assert textwrap.wrap(text.replace("\N{NO-BREAK SPACE}", " "), 3, break_long_words=False) != [text]


@pytest.mark.parametrize("write", [scientific, at_most])
def test_what_is_no_number_is_refused(write):
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"value is (nan|inf): give a finite number"):
            write(value)
