"""Which MLPs the theorem covers: the edit is exact for these, and all others are refused when a block is made."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from icl_lib import ContextualBlock, MeanPooling, implicit_update
from icl_lib.blocks.structure import first_and_last_linear


class Form(nn.Module):
    """An MLP of six features given by a function of its maps and its input."""

    def __init__(self, function, **extra):
        super().__init__()
        self.down = nn.Linear(9, 6)  # before up: the order of running counts, not of writing
        self.up, self.gate = nn.Linear(6, 9), nn.Linear(6, 9)
        self.function = function
        for name, value in extra.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


class Adapted(nn.Linear):
    """As adapters do it: a linear map that adds something of its own."""

    def forward(self, x):
        return super().forward(x) + 2 * x.sum(-1, keepdim=True)


COVERED = {
    "plain": nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)),
    "nested": nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(6, 9), nn.ReLU()), nn.Linear(9, 6)),
    "maps written in another order": Form(lambda m, x: m.down(m.up(x).tanh())),
    "an unused map": Form(lambda m, x: m.down(m.up(x).relu())),
    "norm behind the first map": nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 6)),
    "weight norm": nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 9)), nn.Tanh(), nn.Linear(9, 6)),
    "dropout, not training": nn.Sequential(nn.Linear(6, 9), nn.Dropout(), nn.Linear(9, 6)).eval(),
    "a single map": nn.Linear(6, 6),
}
REFUSED = {
    "no linear map": (nn.Tanh(), False, "mlp has no torch.nn.Linear"),
    "a function": (torch.tanh, False, "mlp is a builtin_function_or_method"),
    "norm first": (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), False, "does not read mlp's input as it is"),
    "gate": (Form(lambda m, x: m.down(m.up(x) * m.gate(x).sigmoid())), False, "not only through"),
    "gate behind a norm": (
        Form(lambda m, x: m.down(m.norm(m.up(x)) * m.gate(x).sigmoid()), norm=nn.LayerNorm(9)),
        False,
        "not only through",
    ),
    "gate behind a threshold": (Form(lambda m, x: m.down((m.up(x) - 1).relu() * m.gate(x))), False, "not only through"),
    "skip that opens far out": (Form(lambda m, x: m.down(m.up(x).tanh()) + (-x - 1).relu()), False, "not only through"),
    "skip scaled by zero so far": (
        Form(lambda m, x: m.down(m.up(x).tanh()) + m.alpha * x, alpha=nn.Parameter(torch.zeros(1))),
        False,
        "not only through",
    ),
    "weights used twice": (Form(lambda m, x: m.up(x).tanh() @ m.up.weight), False, "a second time"),
    "run twice": (Form(lambda m, x: m.square(m.square(x).tanh()), square=nn.Linear(6, 6)), False, "more than once"),
    "adapter": (nn.Sequential(Adapted(6, 9), nn.Tanh(), nn.Linear(9, 6)), False, "computes more than W a"),
    "returns a tuple": (Form(lambda m, x: (m.up(x), x)), False, "returns a tuple"),
    "meta": (nn.Linear(6, 6, device="meta"), False, "on the meta device"),
    "narrower output with a skip": (nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)), True, "6 features and returns 5"),
    "scaled output": (
        Form(lambda m, x: m.gamma * m.down(m.up(x).relu()), gamma=nn.Parameter(torch.ones(6))),
        True,
        "must end in a torch.nn.Linear",
    ),
    **{
        f"skip around {kind.__name__}": (
            nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), kind()),
            True,
            "must end in a torch.nn.Linear",
        )
        for kind in (nn.Tanh, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.ELU)
    },
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("name", COVERED)
def test_what_is_covered_is_exact(name, batch, skip):
    block = ContextualBlock(MeanPooling(), COVERED[name], skip).double()
    context, query = torch.randn(*batch, 5, 6).double(), torch.randn(*batch, 6).double()
    wanted, nothing = block(context, query), context[..., :0, :]
    edited = implicit_update(block, context, query).apply(block)
    assert (edited(nothing, query) - wanted).norm() < 1e-12 * wanted.norm()
    assert (block(nothing, query) - wanted).norm() > 1e-6 * wanted.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused(name):
    mlp, skip, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        ContextualBlock(MeanPooling(), mlp, skip)


def test_looking_changes_nothing():
    mlp = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(), nn.Linear(9, 6)).train()
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    state = torch.random.get_rng_state()
    assert first_and_last_linear(mlp, output_bias=True) == ("0", "3")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert all(module.training for module in mlp.modules())


@pytest.mark.parametrize("arguments", [{"contextual": None}, {"skip": "no"}])
def test_other_arguments_are_checked(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ContextualBlock(**{"contextual": MeanPooling(), "mlp": nn.Linear(6, 6), **arguments})
