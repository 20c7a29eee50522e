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
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from torch import nn

from icl_lib.transformer import Transformer

HOW_TO_REGISTER = """\
Say where the model keeps its parts; for a pre-norm model whose blocks have attention, norm, mlp:

    from icl_lib.anatomy import Anatomy, register_anatomy
    register_anatomy({name}, Anatomy(blocks="blocks", stream="norm", inner=("mlp.up",), outer="mlp.down"))

icl_lib/language/architectures.py has entries of many other forms.
"""


@dataclass(frozen=True, repr=False)
class Anatomy:
    r"""Places in a model, as paths that `torch.nn.Module.get_submodule` takes.

    The first four say it for a block of the plain form; the others are for language models, which are fed token ids.

    Attributes:
        blocks: in the model, the list of blocks; a block is called as ``block(stream)`` and returns a stream.
        stream: in a block, the module that reads the stream after attention, $h$: the norm before the MLP, or the MLP
            itself where there is none.
        inner: in a block, the linear maps that read $z$, what the MLP reads; nothing else may read it.
        outer: in a block, the linear map whose bias is added to the stream after the MLP, $b'$; None where the block
            has no skip connection around its MLP, so that $h$ reaches the output only through $z$.
        parallel: whether the MLP reads the stream as it came in, which no context has changed yet. Then ``inner`` is
            empty and ``stream`` names the attention, whose answer joins the stream at the end.
        scale: in a block, the norm between the MLP and the stream, whose scale is a vector ``weight``.
        router: in a block with experts, the module that chooses them, whose logits are its ``weight`` times $z$, and
            which answers ``(logits, gates, chosen)``, the last two ``[tokens, active experts]``. Then ``inner`` and
            ``outer`` are parameters ``[expert, out, in]``.
        otherwise: the places in those blocks that have no ``router``, where only some have experts.
    """

    blocks: str
    stream: str
    inner: tuple[str, ...]
    outer: str | None
    _: KW_ONLY
    parallel: bool = False
    scale: str | None = None
    router: str | None = None
    otherwise: Anatomy | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "stream", "outer", "scale", "router"):
            value = getattr(self, name)
            optional = name in ("outer", "scale", "router")
            if not (isinstance(value, str) and value) and not (optional and value is None):
                raise ValueError(f"{name} is {value!r}: give a path, such as 'mlp.0'.")
        paths = isinstance(self.inner, tuple) and all(isinstance(path, str) for path in self.inner)
        if not paths or bool(self.inner) == self.parallel:
            needed = "an empty tuple, as the MLP of a parallel block needs no edit" if self.parallel else "a tuple"
            raise ValueError(f"inner is {self.inner!r}: give {needed} of paths, such as ('mlp.0',).")

    @property
    def outer_choices(self) -> tuple[str, ...]:
        r"""What can take $\Delta h$ in a language model, the default first: see :func:`icl_lib.absorb.absorb`."""
        if self.router:
            return ("down",)
        return ("down", "bias") if self.scale is None else ("down", "scale")

    def of(self, block: nn.Module) -> Anatomy:
        """The places in this block: ``otherwise`` where it has no router."""
        return self if self.otherwise is None or _has(block, self.router) else self.otherwise

    def __repr__(self) -> str:
        said = [(field.name, getattr(self, field.name)) for field in fields(self)]
        kept = [f"{name}={value!r}" for name, value in said[:4]]
        return f"Anatomy({', '.join(kept + [f'{name}={value!r}' for name, value in said[4:] if value])})"


_ENTRIES: dict[type, Anatomy | Callable[[Any], Anatomy]] = {}
ARCHITECTURES: dict[str, Anatomy | Callable[[Any], Anatomy]] = {}
"""Entries by the ``model.config.model_type`` of Hugging Face, so that their classes need not be imported."""


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
    _require_unadapted(model)
    if entry is None:
        entry = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", None))
    if entry is None:
        known = ", ".join([*sorted(cls.__name__ for cls in _ENTRIES), *sorted(ARCHITECTURES)])
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
        where, here = f"{anatomy.blocks}[{index}]", anatomy.of(block)
        for path in filter(None, (here.stream, here.scale, here.router)):
            _place(block, where, path)
        for path in (*here.inner, *filter(None, [here.outer])):
            if here.router:
                holder, kept = parameter_at(block, path, where), f"{where}.{path}"
            else:
                holder, kept = _place(block, where, path), f"{where}.{path}"
                _require_linear(holder, kept)
            if id(holder) in owners:
                raise ValueError(
                    f"{kept} is the same module as {owners[id(holder)]}, and each needs edits of its own: give "
                    "each place a copy (copy.deepcopy)."
                )
            owners[id(holder)] = kept
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            raise ValueError(f"model.{name} is compiled, and would not see the edits: take the model before compile().")


def _require_unadapted(model: Any) -> None:
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"model{name and '.'}{name} is a {type(module).__name__}: the model carries an adapter already, which "
                "the edits would not see. Call model.merge_and_unload() first, or take the model without it."
            )


def parameter_at(block: nn.Module, path: str, where: str) -> nn.Parameter:
    """The parameter of this path, ``[expert, out, in]``."""
    parent, _, name = path.rpartition(".")
    weight = getattr(_place(block, where, parent), name, None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3:
        raise ValueError(f"{where}.{path} is a {type(weight).__name__}: it must be a parameter [expert, out, in].")
    return weight


def is_transposed(linear: nn.Module) -> bool:
    """Whether the map holds its weight as ``[in, out]``, as GPT-2's do."""
    return f"{type(linear).__module__}.{type(linear).__name__}" == "transformers.pytorch_utils.Conv1D"


def _require_linear(linear: Any, where: str) -> None:
    """Require a map that answers $W z + b$ and nothing else: it is its weights that are edited."""
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not (plain or is_transposed(linear)) or not linear.weight.dtype.is_floating_point:
        raise ValueError(
            f"{where} is a {type(linear).__name__}: it must be a plain torch.nn.Linear. (Quantised models: load the "
            "weights as bfloat16 or float32.)"
        )
    if linear._forward_hooks or linear._forward_pre_hooks or "weight" in vars(linear):
        raise ValueError(
            f"{where} carries a forward hook, so it need not answer W z + b: leave the `with` block in which the model "
            "is patched, or remove the hook."
        )


def _place(module: nn.Module, where: str, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"{where} has no {path!r} ({error}): correct the entry with register_anatomy.") from None


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _transformer(model: Transformer) -> Anatomy:
    config = model.config
    return Anatomy(
        blocks="blocks",
        stream="norm_mlp" if config.norm == "pre" else "mlp",
        inner=("mlp.0",),
        outer=f"mlp.{2 * config.hidden_layers}" if config.skip else None,
    )


register_anatomy(Transformer, _transformer)
