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
    if not (isinstance(entry, Anatomy) or callable(entry)):
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
    _require_places(model, anatomy)
    return anatomy


def _require_places(model: nn.Module, anatomy: Anatomy) -> None:
    blocks = list(_place(model, type(model).__name__, anatomy.blocks))
    if not blocks:
        raise ValueError(f"the model's {anatomy.blocks!r} is empty: it must hold at least one block.")
    if len({id(block) for block in blocks}) < len(blocks):
        raise ValueError(
            f"a block stands in {anatomy.blocks!r} more than once: give each place a copy of its own (copy.deepcopy)."
        )
    if not anatomy.inner:
        raise ValueError("the anatomy's inner is empty: name the linear maps that read what the MLP reads.")
    for index, block in enumerate(blocks):
        where = f"{anatomy.blocks}[{index}]"
        _place(block, where, anatomy.stream)
        for path in (*anatomy.inner, *filter(None, [anatomy.outer])):
            linear = _place(block, where, path)
            if not isinstance(linear, nn.Linear):
                raise ValueError(f"{where}.{path} is a {type(linear).__name__}: it must be a torch.nn.Linear.")


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
