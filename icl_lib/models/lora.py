"""Write low-rank edits into the files that PEFT loads as an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from icl_lib.environment import extra
from icl_lib.low_rank import LowRank
from icl_lib.models.anatomy import is_transposed
from icl_lib.models.edited_weights import parameter_at, split

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
TITLE = "# A prompt as an adapter"
"""How the README of an adapter begins; one that begins otherwise is somebody's own, and is kept."""
_PREFIX = "base_model.model."
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def model_file(folder: Path) -> str | None:
    """Return the name of a file by which a folder holds a model, None if there is none.

    Such a file is ``config.json``, or one with weights that are not those of an adapter.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "adapter_model.safetensors").touch(), (folder / "notes.txt").touch()
    >>> model_file(folder)
    >>> (folder / "config.json").touch()
    >>> model_file(folder)
    'config.json'
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    weights = [name for name in names if name.lower().endswith(_WEIGHTS) and not name.startswith("adapter_")]
    return next(iter(["config.json"] * ("config.json" in names) + weights), None)


def require_folder(name: str, folder: Path) -> None:
    """Require that ``folder`` is a folder or can be created; ``name`` is the argument in the error."""
    for path in (folder, *folder.parents):
        if path.exists():
            if not path.is_dir():
                file = "which" if path == folder else f"and {path}"
                raise ValueError(
                    f"{name} is {str(folder)!r}, {file} is a file: give a folder; it is created if it is missing."
                )
            return


def require_free(name: str, folder: Path, overwrite: bool = False, remedy: str = "overwrite=True") -> None:
    """Require that writing an adapter or a model into ``folder`` damages nothing.

    The folder is missing or empty, or ``overwrite`` is true and it holds no model. Transformers loads an adapter that
    lies beside a model together with it, every time, so an adapter is never written there.

    Args:
        name: the argument in the error.
        remedy: how the caller sets ``overwrite``, for the error; empty if the caller cannot set it.
    """
    require_folder(name, folder)
    found = model_file(folder)
    if found is not None:
        raise ValueError(
            f"{name} is {str(folder)!r}, which holds a model ({found}), and writing there would change it: give a new "
            "or an empty folder."
        )
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if there and not overwrite:
        shown = CONFIG if CONFIG in there else there[0]
        replace = f", or {remedy} to replace an earlier adapter in it" if remedy else ""
        raise ValueError(f"{name} is {str(folder)!r}, which holds {shown}: give a new or an empty folder{replace}.")


def write_adapter(
    folder: Path,
    model: nn.Module,
    factors: dict[str, LowRank],
    scales: dict[str, Tensor],
    card: str,
    overwrite: bool = False,
) -> Path:
    r"""Write low-rank edits as a LoRA of PEFT, $\Delta W = B A$ with $B = L$ and $A = R^\top$.

    Args:
        folder: created if it is missing; it must be empty, see ``overwrite``.
        model: the model that the adapter is for.
        factors: the edits, by the path of the linear map in the model; ``path[3]`` is the fourth matrix of a parameter.
        scales: the new scales of norms, by the path of the norm; PEFT calls these ``modules_to_save``.
        card: the text of the README, which says what the adapter is good for.
        overwrite: write into a folder that is not empty, over an earlier adapter; other files in it are kept.

    Raises `ValueError` for a folder that holds a model, and without ``overwrite`` for one that holds any file.

    All edits are padded with zeros to the largest rank. ``lora_alpha`` is that rank, so PEFT multiplies them by one.
    """
    require_free("folder", folder, overwrite)
    with extra("llm"):
        from safetensors.torch import save_file

    rank = max(edit.left.shape[-1] for edit in factors.values())
    experts: dict[str, dict[int, LowRank]] = {}
    tensors = {f"{_PREFIX}{path}.weight": scale for path, scale in scales.items()}
    # PEFT renames the modules of some mixtures, but not their parameters; so a mixture is given as parameters.
    mixture = any(split(path)[1] is not None for path in factors)
    modules, parameters, transposed = set(), set(), False
    for path, edit in factors.items():
        name, expert = split(path)
        if expert is not None:
            experts.setdefault(name, {})[expert] = edit
            continue
        module = model.get_submodule(path)
        transposed |= is_transposed(module)
        if mixture:
            parameters.add(f"{path}.weight")
        else:
            modules.add(path)
        tensors |= _pair(path, _padded(edit.right, rank).mT, _padded(edit.left, rank))
    for path, edits in experts.items():
        parameters.add(path)
        tensors |= _pair(_wrapped(model, path, experts.keys()), *_stacked(edits, len(parameter_at(model, path)), rank))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": sorted(scales) or None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    readme = folder / CARD
    if not readme.exists() or readme.read_text(encoding="utf-8").startswith(TITLE):
        readme.write_text(f"{TITLE}\n\n{card}\n", encoding="utf-8")
    return folder


def _pair(path: str, down: Tensor, up: Tensor) -> dict[str, Tensor]:
    return {f"{_PREFIX}{path}.lora_A.weight": down, f"{_PREFIX}{path}.lora_B.weight": up}


def _padded(factor: Tensor, rank: int) -> Tensor:
    return nn.functional.pad(factor, (0, rank - factor.shape[-1]))


def _stacked(edits: dict[int, LowRank], experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors of all experts in PEFT's order: ``[expert · rank, in]`` and ``[out, rank · expert]``."""
    like = next(iter(edits.values()))
    none = LowRank(torch.zeros_like(like.left), torch.zeros_like(like.right))
    all_ = [edits.get(expert, none) for expert in range(experts)]
    down = torch.cat([_padded(edit.right, rank).mT for edit in all_])
    return down, torch.stack([_padded(edit.left, rank) for edit in all_], dim=-1).flatten(1)


def _wrapped(model: nn.Module, path: str, targets: Iterable[str]) -> str:
    """Return the path of a parameter's factors: PEFT wraps the module once for each parameter, the last outermost."""
    parent, _, name = path.rpartition(".")
    names = [one for one, _ in model.get_submodule(parent).named_parameters(recurse=False)]
    later = [one for one in names[names.index(name) + 1 :] if f"{parent}.{one}" in targets]
    return parent + ".base_layer" * len(later)
