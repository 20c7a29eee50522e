r"""Where an architecture keeps what the theorem speaks of: data, not code.

A residual block reads its stream $s$, adds what attention reads to give $h$, and then its MLP reads
$z = \mathrm{LN}'(h)$ ($z = h$ where no norm stands before the MLP). An :class:`Anatomy` names the modules at these
places, so that :func:`icl_lib.absorb.absorb` and :func:`icl_lib.verification.verify` work on a model without knowing
its class.

>>> from icl_lib import Transformer, TransformerConfig
>>> anatomy_of(Transformer(TransformerConfig(dim=4, blocks=2, norm="pre")))
Anatomy(blocks='blocks', stream='norm_mlp', inner=('mlp.0',), outer='mlp.2')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from icl_lib.transformer import Transformer

HOW_TO_REGISTER = """\
Say where the model keeps its parts; for a pre-norm model whose blocks have attention, norm, mlp:

    from icl_lib.anatomy import Anatomy, register_anatomy
    register_anatomy({name}, Anatomy(blocks="blocks", stream="norm", inner=("mlp.up",), outer="mlp.down"))
"""


@dataclass(frozen=True)
class Anatomy:
    r"""Places in a model, as paths that `torch.nn.Module.get_submodule` takes.

    Attributes:
        blocks: in the model, the list of blocks; a block is called as ``block(stream)`` and returns a stream.
        stream: in a block, the module that reads the stream after attention, $h$: the norm before the MLP, or the MLP
            itself where there is none.
        inner: in a block, the linear maps that read $z$, what the MLP reads; nothing else may read it.
        outer: in a block, the linear map whose bias is added to the stream after the MLP, $b'$; None where the block
            has no skip connection around its MLP, so that $h$ reaches the output only through $z$.
    """

    blocks: str
    stream: str
    inner: tuple[str, ...]
    outer: str | None

    def __post_init__(self) -> None:
        for name in ("blocks", "stream", "outer"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and not (name == "outer" and value is None):
                raise ValueError(f"{name} is {value!r}: give a path, such as 'mlp.0'.")
        if not isinstance(self.inner, tuple) or not self.inner or not all(isinstance(path, str) for path in self.inner):
            raise ValueError(f"inner is {self.inner!r}: give a tuple of paths, such as ('mlp.0',).")


_ENTRIES: dict[type, Anatomy | Callable[[Any], Anatomy]] = {}


def register_anatomy(model_type: Any, entry: Any) -> None:
    """Make a model's class known.

    Args:
        model_type: the class, a subclass of `torch.nn.Module`; its subclasses are covered as well.
        entry: an :class:`Anatomy`, or a function of the model that returns one, for a class with options.

    Raises `ValueError` for anything else. A class that is known already gets the new entry.

    >>> class Mine(nn.Module):
    ...     pass
    >>> register_anatomy(Mine, Anatomy(blocks="layers", stream="mlp", inner=("mlp.0",), outer=None))
    """
    if not (isinstance(model_type, type) and issubclass(model_type, nn.Module)):
        raise ValueError(f"model_type is {model_type!r}: give a class of models, such as type(model).")
    if not isinstance(entry, Anatomy) and (isinstance(entry, type) or not callable(entry)):
        raise ValueError(f"entry is a {type(entry).__name__}: give an Anatomy or a function model -> Anatomy.")
    _ENTRIES[model_type] = entry


def anatomy_of(model: Any) -> Anatomy:
    """The places in this model, checked to be there.

    Raises `ValueError` for an unknown class, showing how to make it known, and for an entry that does not fit the
    model, naming the place.
    """
    entry = next((_ENTRIES[cls] for cls in type(model).__mro__ if cls in _ENTRIES), None)
    if entry is None:
        known = ", ".join(sorted(cls.__name__ for cls in _ENTRIES))
        name = type(model).__name__
        raise ValueError(
            f"model is a {name}, whose anatomy is unknown (known: {known}). {HOW_TO_REGISTER.format(name=name)}"
        )
    anatomy = entry if isinstance(entry, Anatomy) else entry(model)
    if not isinstance(anatomy, Anatomy):
        raise ValueError(
            f"the entry of {type(model).__name__} gives a {type(anatomy).__name__}: it must be an Anatomy."
        )
    _require_places(model, anatomy)
    return anatomy


def _require_places(model: nn.Module, anatomy: Anatomy) -> None:
    blocks = _place(model, type(model).__name__, anatomy.blocks)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ValueError(f"the model's {anatomy.blocks!r} is no list of blocks: it must be a torch.nn.ModuleList.")
    owners: dict[int, str] = {}
    for index, block in enumerate(blocks):
        where = f"{anatomy.blocks}[{index}]"
        _place(block, where, anatomy.stream)
        for path in (*anatomy.inner, *filter(None, [anatomy.outer])):
            linear = _place(block, where, path)
            _require_linear(linear, f"{where}.{path}")
            if id(linear) in owners:
                raise ValueError(
                    f"{where}.{path} is the same module as {owners[id(linear)]}, and each needs edits of its own: give "
                    "each place a copy (copy.deepcopy)."
                )
            owners[id(linear)] = f"{where}.{path}"
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ValueError(f"model.{name} is compiled, and would not see the edits: take the model before compile().")


def _require_linear(linear: Any, where: str) -> None:
    """Require a map that answers $W z + b$ and nothing else: it is its weights that are edited."""
    if not isinstance(linear, nn.Linear) or type(linear).forward is not nn.Linear.forward:
        raise ValueError(f"{where} is a {type(linear).__name__}: it must be a plain torch.nn.Linear.")
    if linear._forward_hooks or linear._forward_pre_hooks:
        raise ValueError(
            f"{where} carries a forward hook, so it need not answer W z + b: leave the `with` block in which the model "
            "is patched, or remove the hook."
        )


def _place(module: nn.Module, where: str, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{where} has no {path!r} ({error}): correct the entry with register_anatomy.") from None


def _transformer(model: Transformer) -> Anatomy:
    config = model.config
    return Anatomy(
        blocks="blocks",
        stream="norm_mlp" if config.norm == "pre" else "mlp",
        inner=("mlp.0",),
        outer=f"mlp.{2 * config.hidden_layers}" if config.skip else None,
    )


register_anatomy(Transformer, _transformer)
