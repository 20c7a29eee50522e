r"""Where the modules that the theorem needs are in a model: one :class:`Anatomy` for each architecture.

A residual block reads its residual stream, adds the output of its attention to give $h$, and its MLP reads
$z = \mathrm{LN}'(h)$ ($z = h$ without a norm before the MLP). Every path from $z$ to the output of the MLP begins with
a linear map, and these maps are edited. The block's stream ends as $s \odot h + m \odot \mathrm{MLP}(z)$; in most
architectures $s = m = 1$.

>>> from icl_lib import Transformer, TransformerConfig
>>> known_anatomy(Transformer(TransformerConfig(dim=4, blocks=2, norm="pre")))
Anatomy(blocks='blocks', stream='norm_mlp', inner=('mlp.0',), outer='mlp.2')
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor, nn

from icl_lib.blocks.transformer import Transformer

Factor = float | str
"""A number, or the path of a number or of a vector of the stream's width in the block."""

HOW_TO_REGISTER = """\
from icl_lib import Anatomy, register_anatomy
register_anatomy({name}, {anatomy!r})"""


@dataclass(frozen=True, repr=False)
class Anatomy:
    r"""The places of a model's parts, as paths for `torch.nn.Module.get_submodule`.

    Attributes:
        blocks: in the model, the list of blocks. A block reads the residual stream and returns it, alone or as the
            first part of a tuple.
        stream: in a block, the module that reads the residual stream after attention, $h$: the norm before the MLP, or
            the MLP itself if there is no norm.
        inner: in a block, the linear maps that read $z$, the input of the MLP; a router and the maps of a shared expert
            are among them. A map is a module with a matrix ``weight``, or a parameter with one matrix for each expert
            (``[expert, out, in]``, or ``[expert, in, out]``, whichever its module multiplies with). The module of such
            a parameter must be called as ``experts(z, chosen, gates)``, the last two ``[tokens, active experts]``.
        outer: in a block, the linear map whose output is added to the residual stream after the MLP; its edit adds the
            change of the stream. It may be a parameter of experts, as for ``inner``. None if ``scale`` alone adds it,
            or if the block has no skip connection around its MLP: then $h$ reaches the output only through $z$.
        parallel: whether the MLP reads the block's input and not the output of its attention. Then no map of the MLP
            needs an edit, ``inner`` is empty, and ``stream`` names the attention, whose output is added to the residual
            stream at the end of the block.
        scale: in a block, the norm between the MLP and the residual stream. Its scale is a vector ``weight``; if it
            has a ``bias``, that adds the change.
        multiplier: $m$, the factor on the output of the MLP: a number, or the path of a number or vector in the block.
        skip_multiplier: $s$, the factor on $h$ (in a parallel block on the output of the attention), in the same form.
        otherwise: the anatomy of the blocks that lack one of these places, for a model with blocks of several kinds.
    """

    blocks: str
    stream: str
    inner: tuple[str, ...]
    outer: str | None
    _: KW_ONLY
    parallel: bool = False
    scale: str | None = None
    multiplier: Factor = 1.0
    skip_multiplier: Factor = 1.0
    otherwise: Anatomy | None = None

    def __post_init__(self) -> None:
        for name in ("blocks", "stream", "outer", "scale"):
            value = getattr(self, name)
            optional = name in ("outer", "scale")
            if not (isinstance(value, str) and value) and not (optional and value is None):
                raise ValueError(f"{name} is {value!r}: give a path{' or None' if optional else ''}, such as 'mlp.0'.")
        paths = isinstance(self.inner, tuple) and all(isinstance(path, str) for path in self.inner)
        if not paths or bool(self.inner) == self.parallel:
            if self.parallel:
                raise ValueError(f"inner is {self.inner!r}: give (), since the MLP of a parallel block needs no edit.")
            raise ValueError(f"inner is {self.inner!r}: give a tuple of paths, such as ('mlp.0',).")
        for name in ("multiplier", "skip_multiplier"):
            value = getattr(self, name)
            if not value or isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError(f"{name} is {value!r}: give a number other than 0, or the path of one in the block.")

    def of(self, block: nn.Module) -> Anatomy:
        """Return the anatomy of this block: ``otherwise`` if it lacks one of the places."""
        if self.otherwise is None or not any(_missing(block, path) for path in self.places):
            return self
        return self.otherwise.of(block)

    @property
    def places(self) -> tuple[str, ...]:
        """All paths in a block."""
        named = (self.stream, *self.inner, self.outer, self.scale, self.multiplier, self.skip_multiplier)
        return tuple(path for path in named if isinstance(path, str))

    def __repr__(self) -> str:
        said = [(field.name, getattr(self, field.name), field.default) for field in fields(self)]
        kept = [f"{name}={value!r}" for at, (name, value, usual) in enumerate(said) if at < 4 or value != usual]
        return f"Anatomy({', '.join(kept)})"


class Site(NamedTuple):
    """A block of a model: its name in error messages, the block itself, and the places of its parts."""

    where: str
    block: nn.Module
    anatomy: Anatomy


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


def known_anatomy(model: nn.Module) -> Anatomy | None:
    """Return the registered anatomy of this model, or None.

    An entry for the class of the model comes before one for its ``model_type``. Raises `ValueError` for an entry that
    returns something else.
    """
    entry = next((_ENTRIES[cls] for cls in type(model).__mro__ if cls in _ENTRIES), None)
    if entry is None:
        entry = ARCHITECTURES.get(getattr(getattr(model, "config", None), "model_type", None))
    if entry is None:
        return None
    anatomy = entry if isinstance(entry, Anatomy) else entry(model)
    if not isinstance(anatomy, Anatomy):
        raise ValueError(
            f"the entry of {type(model).__name__} returned a {type(anatomy).__name__}: it must return an Anatomy."
        )
    return anatomy


def sites(model: nn.Module, anatomy: Anatomy) -> tuple[Site, ...]:
    """Return the blocks of a model, after checking that the weights at the places of its anatomy are those that run.

    Raises `ValueError`, with the place, for a place that is missing or of another kind, and for whatever stands between
    a weight and the product that runs: a compiled model or module, an adapter, a parametrisation, a hook on the map, a
    weight that two places share.
    """
    require_plain(model)
    blocks = _place(model, type(model).__name__, anatomy.blocks)
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or not len(blocks):
        raise ValueError(
            f"{type(model).__name__}.{anatomy.blocks} is a {type(blocks).__name__}, not a list of one or more blocks: "
            "give the path of a torch.nn.ModuleList or torch.nn.Sequential."
        )
    found = tuple(Site(f"{anatomy.blocks}[{i}]", block, anatomy.of(block)) for i, block in enumerate(blocks))
    owners: dict[int, str] = {}
    for where, block, here in found:
        for path in filter(None, (here.stream, here.scale)):
            if not isinstance(_place(block, where, path), nn.Module):
                raise ValueError(f"{where}.{path} is not a module: name the module that reads the stream, or the norm.")
        for factor in (here.multiplier, here.skip_multiplier):
            factor_at(block, factor, where)
        for path in (*here.inner, *filter(None, [here.outer])):
            weight = _require_map(block, where, path)
            if owners.setdefault(id(weight), f"{where}.{path}") != f"{where}.{path}":
                raise ValueError(
                    f"{where}.{path} is the same weight as {owners[id(weight)]}, but each needs its own edit: put a "
                    "copy (copy.deepcopy) at one of the two places."
                )
    return found


def require_plain(model: nn.Module) -> None:
    """Require that no module is compiled or carries an adapter: edits would not reach what runs."""
    if hasattr(model, "_orig_mod"):  # what torch.compile returns
        raise ValueError("model is compiled, so edits would not reach it: give the model before torch.compile().")
    for name, module in model.named_modules():
        at = f"model.{name}" if name else "model"
        if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            raise ValueError(f"{at} is compiled, so edits would not reach it: give the model before compile().")
        if hasattr(module.forward, "_torchdynamo_orig_callable"):
            raise ValueError(
                f"{at}.forward is compiled, so edits would not reach it: give the model before torch.compile()."
            )
        if type(module).__module__.split(".")[0] == "peft":
            raise ValueError(
                f"{at} is a {type(module).__name__}: the model carries an adapter already, and the edits would ignore "
                "it. Call model.merge_and_unload() first, or give the model without its adapter."
            )


def outer_choices(placed: Sequence[Site]) -> tuple[str, ...]:
    r"""Return the weights that can add $\Delta h$ in all of these blocks; see :func:`icl_lib.models.absorb.absorb`."""
    choices = [set(_choices(block, anatomy)) for _, block, anatomy in placed if anatomy.outer or anatomy.scale]
    return tuple(kind for kind in ("down", "bias", "scale") if choices and all(kind in some for some in choices))


def _choices(block: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    if anatomy.scale is None:
        return ("down",) if is_experts(block, anatomy.outer) else ("down", "bias")
    norm = block.get_submodule(anatomy.scale)
    biased = norm._parameters.get("bias") is not None
    if anatomy.outer is None:
        return ("down", "scale", "bias") if biased else ("down", "scale")  # the norm adds the change in any case
    if biased or isinstance(norm, nn.LayerNorm):  # turning is for norms that do not subtract the mean
        return ("bias", "scale") if biased else ("scale",)
    return ("down", "scale")


def is_experts(block: nn.Module, path: str) -> bool:
    """Return whether the path names a parameter with one matrix for each expert."""
    return not isinstance(_place(block, "the block", path), nn.Module)


def is_transposed(linear: nn.Module) -> bool:
    """Return whether the map stores its weight as ``[in, out]``, as those of GPT-2 do."""
    return f"{type(linear).__module__}.{type(linear).__name__}" == "transformers.pytorch_utils.Conv1D"


def factor_at(block: nn.Module, factor: Factor, where: str = "the block") -> float | Tensor:
    """Return the number or the vector that a factor of an anatomy names."""
    if not isinstance(factor, str):
        return factor
    value = _place(block, where, factor)
    if not isinstance(value, (int, float, Tensor)):
        raise ValueError(f"{where}.{factor} is a {type(value).__name__}: a multiplier must be a number or a vector.")
    return value.detach() if isinstance(value, Tensor) else value


def _require_map(block: nn.Module, where: str, path: str) -> Tensor:
    """Require a map that outputs $W z + b$ and nothing else, since the edit changes only $W$; return $W$."""
    found, at = _place(block, where, path), f"{where}.{path}"
    if isinstance(found, nn.Parameter):
        if found.ndim != 3:
            raise ValueError(f"{at} is a parameter {list(found.shape)}: that of experts must be [expert, out, in].")
        return found
    shadowed = "weight" in vars(found) if isinstance(found, nn.Module) else False
    if shadowed and hasattr(found.weight, "is_edited"):
        raise ValueError(f"{at} is edited: leave the `with` block in which the model is patched.")
    weight = found._parameters.get("weight") if isinstance(found, nn.Module) else None
    if shadowed or (weight is None and isinstance(getattr(found, "weight", None), Tensor)):
        raise ValueError(
            f"{at}.weight is computed from other parameters, so an edit of it would not last: remove the "
            "parametrisation first (torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
            "prune.remove)."
        )
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{at} is a {type(found).__name__}: it must be a linear map with a floating-point matrix `weight`. "
            "(Quantised models: load the weights as bfloat16 or float32.)"
        )
    if found._forward_hooks or found._forward_pre_hooks:
        raise ValueError(f"{at} carries a forward hook, so its output may differ from W z + b: remove the hook.")
    return weight


def _place(module: nn.Module, where: str, path: str) -> Any:
    """Return the module, the parameter or the number at this path."""
    try:
        return functools.reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ValueError(f"{where} has no {path!r} ({error}): correct the entry with register_anatomy.") from None


def _missing(block: nn.Module, path: str) -> bool:
    try:
        _place(block, "", path)
    except ValueError:
        return True
    return False


def _transformer(model: Transformer) -> Anatomy:
    config = model.config
    return Anatomy(
        blocks="blocks",
        stream="norm_mlp" if config.norm == "pre" else "mlp",
        inner=("mlp.0",),
        outer=f"mlp.{2 * config.hidden_layers}" if config.skip else None,
    )


register_anatomy(Transformer, _transformer)
