"""Input and output control: the theorem's edit for a linear map, and parts that cannot be controlled."""

import pytest
import torch
from cases import normal
from torch import nn

from icl_lib import output_update, weight_update
from icl_lib.blocks.controllability import input_control, output_control


class Tied(nn.Module):
    """A map and its transpose read the same vector."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width).double())

    def forward(self, read):
        return self.weight @ read, self.weight.T @ read


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False).double() for _ in range(2))

    def forward(self, read):
        return self.gate(read), self.up(read)


def test_the_least_change_of_a_linear_map_is_the_weight_update():
    linear, (z_0, z_C) = nn.Linear(5, 4, bias=False).double(), normal((5,), (5,))
    found = input_control(linear, z_0, z_C)
    update = weight_update(linear.weight.detach(), z_0, z_C)
    assert found.missed < 1e-14
    torch.testing.assert_close(found.edited.weight - linear.weight, update.dense(), rtol=1e-10, atol=1e-12)
    assert found.norm == pytest.approx(update.norm().item(), rel=1e-10)
    change = normal((4,), seed=3)[0]
    added = output_control(linear, z_0, change)
    torch.testing.assert_close(
        added.edited.weight - linear.weight, output_update(change, z_0).dense(), rtol=1e-10, atol=1e-12
    )


def test_several_maps_and_a_nonlinear_part():
    z_0, z_C = normal((5,), (5,))
    gated = Gated(5, 7)
    found = input_control(gated, z_0, z_C)
    assert found.missed < 1e-14
    torch.testing.assert_close(found.edited.up(z_0), gated.up(z_C), rtol=1e-10, atol=1e-12)
    deep = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    assert input_control(deep, z_0, z_C).missed < 1e-10


def test_parts_that_cannot_be_controlled():
    torch.manual_seed(0)
    z_0, z_C = normal((4,), (4,))
    change = torch.ones(4).double()
    linear = nn.Linear(4, 4, bias=False).double()
    assert input_control(linear, 0 * z_0, z_C).missed == pytest.approx(1)  # a zero input
    tied = Tied(4)
    assert input_control(tied, z_0, z_C).missed > 1e-2
    symmetric = Tied(4)
    symmetric.weight.data += symmetric.weight.data.T.clone()  # then z_0ᵀ V z_C = z_Cᵀ V z_0
    assert input_control(symmetric, z_0, z_C).missed < 1e-10
    normed = nn.Sequential(linear, nn.RMSNorm(4, elementwise_affine=False)).double()
    assert output_control(normed, z_0, 10 * change).missed > 0.1  # a norm fixes the length
    assert output_control(nn.Sequential(linear, nn.Tanh()), z_0, 10 * change).missed > 0.1  # out of its range
    assert output_control(nn.Sequential(linear, nn.RMSNorm(4).double()), z_0, 10 * change).missed < 1e-10


def test_the_module_is_left_as_it_was():
    linear, (z_0, z_C) = nn.Linear(5, 4).double(), normal((5,), (5,))
    before = linear.weight.clone()
    input_control(linear, z_0, z_C)
    assert torch.equal(linear.weight, before)


def test_errors():
    linear, z = nn.Linear(3, 2), torch.zeros(3)
    with pytest.raises(ValueError, match="module has no parameters"):
        input_control(nn.ReLU(), z, z)
    with pytest.raises(ValueError, match="give one vector"):
        input_control(linear, torch.zeros(1, 3), z)
    with pytest.raises(ValueError, match=r"change has shape \(3,\), and the output \(2,\)"):
        output_control(linear, z, z)
    with pytest.raises(ValueError, match="steps is 0"):
        input_control(linear, z, z, steps=0)
