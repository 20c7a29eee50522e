r"""The names of the modules of a model that the theorem needs, for each architecture.

A residual block reads its residual stream, adds the output of its attention to give $h$, and its MLP reads
$z = \mathrm{LN}'(h)$ ($z = h$ without a norm before the MLP). An :class:`Anatomy` holds the paths of the modules that
read $h$ and $z$ and of the last map of the MLP. With it, :func:`icl_lib.absorb.absorb` and
:func:`icl_lib.verification.verify` work on a model of any class.

>>> from icl_lib import Transformer, TransformerConfig
>>> anatomy_of(Transformer(TransformerConfig(dim=4, blocks=2, norm="pre")))
Anatomy(blocks='blocks', stream='norm_mlp', inner=('mlp.0',), outer='mlp.2')
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from torch import Tensor, nn

from icl_lib.transformer import Transformer

HOW_TO_REGISTER = """\
Register the paths of its parts. For a pre-norm model whose blocks have the parts attention, norm and mlp:

    from icl_lib.anatomy import Anatomy, register_anatomy
    register_anatomy({name}, Anatomy(blocks="blocks", stream="norm", inner=("mlp.up",), outer="mlp.down"))

icl_lib/language/architectures.py has entries for many other kinds of blocks.
"""


@dataclass(frozen=True, repr=False)
class Anatomy:
    r"""The places of a model's parts, as paths for `torch.nn.Module.get_submodule`.

    The first four fields describe a plain block. The others are for language models, whose inputs are token ids.

    Attributes:
        blocks: in the model, the list of blocks. A block is called as ``block(stream)`` and returns the residual
            stream.
        stream: in a block, the module that reads the residual stream after attention, $h$: the norm before the MLP, or
            the MLP itself if there is no norm.
        inner: in a block, the linear maps that read $z$, the input of the MLP. No other module may read $z$.
        outer: in a block, the linear map whose bias $b'$ is added to the residual stream after the MLP. None if the
            block has no skip connection around its MLP: then $h$ reaches the output only through $z$.
        parallel: whether the MLP reads the block's input and not the output of its attention. Then no map of the MLP
            needs an edit, ``inner`` is empty, and ``stream`` names the attention, whose output is added to the residual
            stream at the end of the block.
        scale: in a block, the norm between the MLP and the residual stream. Its scale is a vector ``weight``.
        router: in a block with experts, the module that chooses them. Its logits are its ``weight`` times $z$, and it
            returns ``(logits, gates, chosen)``, the last two of shape ``[tokens, active experts]``. Then ``inner`` and
            ``outer`` are parameters ``[expert, out, in]``.
        otherwise: if only some blocks have a ``router``, the anatomy of the blocks without one.
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
                raise ValueError(f"{name} is {value!r}: give a path{' or None' if optional else ''}, such as 'mlp.0'.")
        paths = isinstance(self.inner, tuple) and all(isinstance(path, str) for path in self.inner)
        if not paths or bool(self.inner) == self.parallel:
            if self.parallel:
                raise ValueError(f"inner is {self.inner!r}: give (), since the MLP of a parallel block needs no edit.")
            raise ValueError(f"inner is {self.inner!r}: give a tuple of paths, such as ('mlp.0',).")

    @property
    def outer_choices(self) -> tuple[str, ...]:
        r"""The weights that can add $\Delta h$ in a language model, the default first; see :mod:`icl_lib.absorb`."""
        if self.router:
            return ("down",)
        return ("down", "bias") if self.scale is None else ("down", "scale")

    def of(self, block: nn.Module) -> Anatomy:
        """Return the anatomy of this block: ``otherwise`` if it has no router."""
        return self if self.otherwise is None or _has(block, self.router) else self.otherwise

    def __repr__(self) -> str:
        said = [(field.name, getattr(self, field.name)) for field in fields(self)]
        kept = [f"{name}={value!r}" for name, value in said[:4]]
        return f"Anatomy({', '.join(kept + [f'{name}={value!r}' for name, value in said[4:] if value])})"


_ENTRIES: dict[type, Anatomy | Callable[[Any], Anatomy]] = {}
ARCHITECTURES: dict[str, Anatomy | Callable[[Any], Anatomy]] = {}
"""Entries by ``model.config.model_type`` of Hugging Face: with them, no class of Hugging Face has to be imported."""


def register_anatomy(model_type: Any, entry: Any) -> None:
    """Register the anatomy of a class of models.

    Args:
        model_type: the class, a subclass of `torch.nn.Module`. The entry also applies to its subclasses.
        entry: an :class:`Anatomy`, or a function that takes the model and returns one, for a class with options.

    A second call for the same class replaces the entry. Raises `ValueError` if an argument is of another kind.

    >>> class Mine(nn.Module):
    ...     pass
    >>> register_anatomy(Mine, Anatomy(blocks="layers", stream="mlp", inner=("mlp.0",), outer=None))
    """
    if not (isinstance(model_type, type) and issubclass(model_type, nn.Module)):
        raise ValueError(f"model_type is {model_type!r}: give a subclass of torch.nn.Module, such as type(model).")
    if not isinstance(entry, Anatomy) and (isinstance(entry, type) or not callable(entry)):
        raise ValueError(
            f"entry is a {type(entry).__name__}: give an Anatomy, or a function of the model that returns one."
        )
    _ENTRIES[model_type] = entry


def anatomy_of(model: Any) -> Anatomy:
    """Return the anatomy of this model, after checking that each of its places exists.

    Raises `ValueError` for an unknown class, with the code that registers it, and for an entry that does not fit the
    model, with the place.
    """
    if hasattr(model, "_orig_mod"):  # what torch.compile returns
        raise ValueError("model is compiled, so edits would not reach it: give the model before torch.compile().")
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
            f"the entry of {type(model).__name__} returned a {type(anatomy).__name__}: it must return an Anatomy."
        )
    _require_places(model, anatomy)
    return anatomy


def _require_places(model: nn.Module, anatomy: Anatomy) -> None:
    blocks = _place(model, type(model).__name__, anatomy.blocks)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ValueError(
            f"{type(model).__name__}.{anatomy.blocks} is a {type(blocks).__name__}, not a list of one or more blocks: "
            "give the path of a torch.nn.ModuleList or torch.nn.Sequential."
        )
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
            for part, what in ((holder, "module"), (getattr(holder, "weight", holder), "weight")):
                if id(part) in owners and owners[id(part)] != kept:
                    raise ValueError(
                        f"{kept} is the same {what} as {owners[id(part)]}, but each needs its own edit: put a copy "
                        "(copy.deepcopy) at one of the two places."
                    )
                owners[id(part)] = kept
    for name, module in model.named_modules():
        if module._compiled_call_impl is not None:
            at = f"model.{name}" if name else "model"
            raise ValueError(f"{at} is compiled, so edits would not reach it: give the model before compile().")


def _require_unadapted(model: Any) -> None:
    for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"model{name and '.'}{name} is a {type(module).__name__}: the model carries an adapter already, and "
                "the edits would ignore it. Call model.merge_and_unload() first, or give the model without its adapter."
            )


def parameter_at(block: nn.Module, path: str, where: str) -> nn.Parameter:
    """Return the parameter at this path, ``[expert, out, in]``."""
    parent, _, name = path.rpartition(".")
    weight = getattr(_place(block, where, parent), name, None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 3:
        found = f"a {type(weight).__name__}" + (f" {list(weight.shape)}" if isinstance(weight, Tensor) else "")
        raise ValueError(f"{where}.{path} is {found}: it must be a parameter [expert, out, in].")
    return weight


def is_transposed(linear: nn.Module) -> bool:
    """Return whether the map stores its weight as ``[in, out]``, as those of GPT-2 do."""
    return f"{type(linear).__module__}.{type(linear).__name__}" == "transformers.pytorch_utils.Conv1D"


def _require_linear(linear: Any, where: str) -> None:
    """Require a map that outputs $W z + b$ and nothing else, since the edit changes only its weights."""
    plain = isinstance(linear, nn.Linear) and type(linear).forward is nn.Linear.forward
    if not (plain or is_transposed(linear)) or not linear.weight.dtype.is_floating_point:
        raise ValueError(
            f"{where} is a {type(linear).__name__}: it must be a plain torch.nn.Linear with floating-point weights. "
            "(Quantised models: load the weights as bfloat16 or float32.)"
        )
    if linear._forward_hooks or linear._forward_pre_hooks or "weight" in vars(linear):
        raise ValueError(
            f"{where} carries a forward hook, so its output may differ from W z + b: leave the `with` block in which "
            "the model is patched, or remove the hook."
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
