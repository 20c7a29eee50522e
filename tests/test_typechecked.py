"""The check of annotations in these tests gives way to a function's own refusal, and to nothing else."""

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor
from typechecked import after_the_body

import icl_lib
from icl_lib.paper.regression import Prompts, prediction

checked = jaxtyped(
    typechecker=after_the_body
)  # as the import hook decorates each function and dataclass of the library
Vector = Float[Tensor, " n"]


@checked
def double(vector: Vector, drop: int = 0) -> Vector:
    if not isinstance(vector, Tensor):
        raise ValueError(f"vector is a {type(vector).__name__}: give a tensor.")
    return 2 * vector[drop:]


@checked
@dataclass(frozen=True)
class Pair:
    first: Vector
    second: Vector

    def __post_init__(self):
        if len(self.first) == 0:
            raise ValueError("first is empty: give numbers.")

    @property
    @checked
    def total(self) -> Float[Tensor, ""]:
        return self.first + self.second

    @checked
    def weighted(self, weight: Float[Tensor, ""]) -> Vector:
        if weight is None:
            raise ValueError("weight is None: give a number.")
        return weight * self.first

    @classmethod
    @checked
    def twice(cls, vector: Vector) -> object:
        return cls(vector, vector)


@contextlib.contextmanager
@checked
def positive(number: int) -> Iterator[int]:
    if number is None:
        raise ValueError("number is None: give a number.")
    yield number


ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: double([1.0]), "vector is a list"),
        (lambda: double(vector=None), "vector is a NoneType"),
        (lambda: Pair([], ONE), "first is empty"),
        (lambda: Pair(ONE, ONE).weighted(None), "weight is None"),
        (lambda: Pair.twice([]), "first is empty"),
        (lambda: positive(None).__enter__(), "number is None"),
    ],
)
def test_what_the_body_refuses_the_caller_sees(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (lambda: double(torch.ones(2, 2)), "parameter vector"),
        (lambda: double(TWO.long()), "parameter vector"),
        (lambda: double(TWO, drop=torch.tensor(0)), "parameter drop"),
        (lambda: double(TWO, drop=1), "return"),
        (lambda: Pair(ONE, TWO), "parameter second"),
        (lambda: Pair(ONE, ONE).total, "return"),
        (lambda: Pair(ONE, ONE).weighted(ONE), "parameter weight"),
        (lambda: Pair.twice(TWO[None]), "parameter first"),
    ],
)
def test_what_the_body_accepts_the_annotations_refuse(call, where):
    with pytest.raises(TypeCheckError) as caught:
        call()
    assert where in str(caught.value.__cause__)


def test_right_calls_pass():
    assert double(TWO).tolist() == [2.0, 2.0]
    assert Pair.twice(TWO).weighted(torch.tensor(3.0)).tolist() == [3.0, 3.0]
    with positive(3) as number:
        assert number == 3


def test_the_library_itself_is_checked():
    with pytest.raises(TypeCheckError, match="prediction"):
        prediction(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeCheckError, match="Prompts"):
        Prompts(torch.ones(2, 3, 4), torch.ones(5), torch.ones(2, 3))


def test_every_function_of_the_library_says_what_it_returns():
    """Nothing is checked after the body of a function that does not."""
    for file in Path(icl_lib.__file__).parent.rglob("*.py"):
        functions = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef))
        assert [node.name for node in functions if node.returns is None] == [], file
