"""Experts as PEFT folders: written so that PEFT and vLLM open them without a warning, reopened, and read back strictly.

    export_expert(mllm, 2, "run/adapters/task3")     PeftModel.from_pretrained(base, "run/adapters/task3")

A folder holds `adapter_config.json`, `adapter_model.safetensors` and a `README.md`; what PEFT cannot express lies
beside them in files of our own, `projector.safetensors` and `router.safetensors`. A key with a wrong prefix loads
nothing in PEFT and only warns; here missing, left-over and misshapen tensors raise.
"""

# E experts, r rank of one expert, R sum of ranks, K in, N out

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..files import replace_folder

__all__ = ["Adapter", "export_expert", "export_mixture", "export_run", "read_adapter", "write_peft_adapter"]

_PREFIX = "base_model.model."
_SUFFIXES = (".lora_A.weight", ".lora_B.weight")
#: options of PEFT that change what the tensors mean; a folder that sets one is refused
_FOREIGN = (
    "use_dora",
    "use_rslora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "exclude_modules",
)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder as read: y += scaling * (x A^T) B^T at every layer.

    layers: full module path to (A `[r, K]`, B `[N, r]`). scaling: lora_alpha / r. config: all of adapter_config.json.
    projector, router: tensors of the files beside it by name; empty where there is none.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    scaling: float
    config: dict
    projector: dict[str, Tensor] = field(default_factory=dict)
    router: dict[str, Tensor] = field(default_factory=dict)


def write_peft_adapter(
    folder: str | os.PathLike,
    layers: dict[str, tuple[Tensor, Tensor]],
    *,
    scaling: float,
    base_model: str | None,
    task_type: str | None = "CAUSAL_LM",
    description: str = "",
    projector: dict[str, Tensor] | None = None,
    router: dict[str, Tensor] | None = None,
) -> Path:
    """Write one adapter as a PEFT folder, reopen it and put it in the place of `folder`, whole or not at all.

    Args:
        layers: full module path, as in `model.named_modules()`, to (A `[r, K]`, B `[N, r]`), floating point, one rank
            throughout (vLLM reads only one); slices and other devices are fine.
        scaling: the adapter's y is multiplied by it; written as lora_alpha = scaling * r.
        base_model: name or folder of the model it belongs to, None if it has none.
        task_type: of PEFT; None for a model that cannot generate by itself.
        description: sentences for the README.
        projector, router: tensors for the files of our own.

    Raises:
        ValueError, TypeError: no layers, wrong shapes, unequal ranks, or what was written does not read back.
    """
    rank = _check_layers(layers)
    alpha = float(scaling) * rank
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": list(layers),
        "bias": "none",
        "inference_mode": True,
    }
    tensors = {}
    for path, pair in layers.items():
        tensors |= {f"{_PREFIX}{path}{suffix}": tensor for suffix, tensor in zip(_SUFFIXES, pair, strict=True)}

    def fill(temporary: Path) -> None:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n")
        _save(tensors, temporary / "adapter_model.safetensors")
        for name, own in (("projector", projector), ("router", router)):
            if own:
                _save(own, temporary / f"{name}.safetensors")
        (temporary / "README.md").write_text(_readme(config, scaling, len(layers), description, projector, router))
        shapes = {path: (b_Nr.shape[0], a_rK.shape[1]) for path, (a_rK, b_Nr) in layers.items()}
        reopened = read_adapter(temporary, shapes)
        for name, own in (("projector", projector), ("router", router)):
            _compare(f"{temporary / name}.safetensors", _shapes(own or {}), _shapes(getattr(reopened, name)))

    replace_folder(folder, fill)
    return Path(folder)


def _check_layers(layers: dict[str, tuple[Tensor, Tensor]]) -> int:
    """The rank that all layers share."""
    if not layers:
        raise ValueError("write_peft_adapter: layers must have at least one entry, got none")
    ranks: dict[int, str] = {}
    for path, (a_rK, b_Nr) in layers.items():
        if not (a_rK.is_floating_point() and b_Nr.is_floating_point()):
            raise TypeError(f"write_peft_adapter: layers[{path!r}] must be floats, got {a_rK.dtype} and {b_Nr.dtype}")
        if a_rK.dim() != 2 or b_Nr.dim() != 2 or a_rK.shape[0] != b_Nr.shape[1] or a_rK.shape[0] == 0:
            raise ValueError(
                f"write_peft_adapter: layers[{path!r}] must be A [r, in] and B [out, r] with r > 0, got "
                f"{list(a_rK.shape)} and {list(b_Nr.shape)}"
            )
        ranks.setdefault(a_rK.shape[0], path)
    if len(ranks) > 1:
        told = ", ".join(f"{rank} at {path}" for rank, path in ranks.items())
        raise ValueError(f"write_peft_adapter: layers must share one rank, got {told}")
    return next(iter(ranks))


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    # a clone of its own for each: slices of a stack share memory, which safetensors refuses
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # PEFT marks its files so, and transformers insists on the mark
    save_file(own, path, metadata={"format": "pt"})
    # safetensors lets only the owner read its files; they follow the umask like the others
    shutil.copymode(path.with_name("adapter_config.json"), path)


def _readme(config: dict, scaling: float, num_layers: int, description: str, projector, router) -> str:
    base = config["base_model_name_or_path"] or "the model it was trained with (which has no published name)"
    parts = [
        "# LoRA adapter",
        description,
        f"Base model: {base}. Rank {config['r']}, lora_alpha {config['lora_alpha']} (scaling {scaling:g}), "
        f"{num_layers} linear layers by full module path. y += scaling * (x A^T) B^T.",
        "`PeftModel.from_pretrained(base, folder)` opens `adapter_config.json` and `adapter_model.safetensors`.",
    ]
    if projector:
        parts.append(
            "`projector.safetensors` holds the projector that belongs to this adapter, by the names of the base "
            "model's parameters. PEFT does not read it: copy its tensors into the base model before use."
        )
    if router:
        parts.append(
            "`router.safetensors` holds the learned in-layer routers by the names of the model's parameters, such as "
            "`<module path>.router_weight` of shape [experts, in]. PEFT cannot express gates that differ from token to "
            "token: opened by PEFT, this adapter acts on every token with weight 1. The routed mixture needs mllmcl, "
            "all experts and this file."
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def read_adapter(folder: str | os.PathLike, shapes: dict[str, tuple[int, int]] | None = None) -> Adapter:
    """Read a PEFT LoRA folder; every tensor that should be there is, and nothing else.

    Args:
        shapes: module path to (out, in) of every layer that the adapter must have, from the model it is for. Without it
            the layers are those that `target_modules` names, which then have to be full module paths.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a tensor is missing, left over or of another shape (with the first three names), the config is not
            plain LoRA, or a file is damaged.
    """
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    file, targets = folder / "adapter_model.safetensors", config["target_modules"]
    tensors = _load(file)
    paths = list(targets) if shapes is None else list(shapes)
    expected = {}
    for path in paths:
        out, width = (None, None) if shapes is None else shapes[path]
        expected[f"{_PREFIX}{path}{_SUFFIXES[0]}"] = (config["r"], width)
        expected[f"{_PREFIX}{path}{_SUFFIXES[1]}"] = (out, config["r"])
    _compare(str(file), expected, _shapes(tensors))
    unmatched = [path for path in paths if not any(path == name or path.endswith(f".{name}") for name in targets)]
    if unmatched:
        raise ValueError(f"{folder}: target_modules does not name {_first(unmatched)}, so PEFT would not load them")
    layers = {path: tuple(tensors[f"{_PREFIX}{path}{suffix}"] for suffix in _SUFFIXES) for path in paths}
    own = {}
    for name in ("projector", "router"):
        beside = folder / f"{name}.safetensors"
        own[name] = _load(beside) if beside.exists() else {}
    return Adapter(layers=layers, scaling=config["lora_alpha"] / config["r"], config=config, **own)


def _read_config(file: Path) -> dict:
    """adapter_config.json, checked to be LoRA of the plain kind."""
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file}: peft_type must be 'LORA', got {kind!r}")
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise ValueError(f"{file}: expected an integer r >= 1 and a number lora_alpha, got {rank!r} and {alpha!r}")
    if not isinstance(targets, list) or not targets or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{file}: target_modules must be a list of module names, got {targets!r}")
    foreign = [key for key in _FOREIGN if config.get(key)]
    if config.get("bias", "none") != "none":
        foreign.append("bias")
    if foreign:
        raise ValueError(f"{file}: only plain LoRA can be read, but {_first(foreign)} is set")
    return config


def _load(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: is not a safetensors file ({error})") from error


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _compare(file: str, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
    """Raise unless both have the same names and shapes (None in a shape allows any size)."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    if missing or extra:
        sides = [f"{len(names)} {what} ({_first(names)})" for what, names in
                 (("missing", missing), ("left over", extra)) if names]  # fmt: skip
        raise ValueError(f"{file}: of {len(expected)} tensors expected, {'; '.join(sides)}")
    wrong = [
        f"{name} {list(found[name])}, expected {[size or 'any' for size in shape]}"
        for name, shape in expected.items()
        if len(found[name]) != len(shape)
        or any(size not in (None, got) for size, got in zip(shape, found[name], strict=True))
    ]
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} tensors of another shape ({_first(wrong, '; ')})")


def _first(names: Iterable[str], separator: str = ", ") -> str:
    names = list(names)
    return separator.join(names[:3]) + (f"{separator}..." if names[3:] else "")


# -- from a model


def export_expert(mllm, expert_index: int, folder: str | os.PathLike, note: str = "") -> Path:
    """Write expert `expert_index` of an `MLLM` as a PEFT folder, with its projector and the learned routers beside it.

    The projector is the expert's copy if it has one, else the shared one if it trains or the model was composed (then
    no published base model has it).

    Args:
        note: a sentence for its README.

    Raises:
        ValueError: there are no experts, or not that many.
    """
    ranks, scaling = _experts(mllm)
    if not 0 <= expert_index < len(ranks):
        raise ValueError(f"export_expert: expert_index must be in 0..{len(ranks) - 1}, got {expert_index}")
    start = sum(ranks[:expert_index])
    rows = slice(start, start + ranks[expert_index])
    layers = {path: (layer.lora_a[rows], layer.lora_b[:, rows]) for path, layer in mllm.expert_layers.items()}
    return write_peft_adapter(
        folder,
        layers,
        scaling=scaling[expert_index],
        description=f"Expert {expert_index} of {len(ranks)} (counted from 0) of a continual-learning run with mllmcl."
        + _merged_note(mllm.experts.num_merged)
        + (f" {note}" if note else ""),
        projector=_projector(mllm, expert_index),
        router=_routers(mllm),
        **_belongs_to(mllm),
    )


def export_mixture(mllm, gates: Tensor | Sequence[float], folder: str | os.PathLike) -> Path:
    """Write the mixture of all experts with constant `gates` `[E]` as one adapter of rank R.

    Gate and scaling of each expert are folded into B, so lora_alpha = R.

    Raises:
        ValueError: there are no experts, gates of another shape, or experts that own projectors (which do not mix).
    """
    ranks, scaling = _experts(mllm)
    gates = torch.as_tensor(gates, dtype=torch.float32).cpu()
    if gates.shape != (len(ranks),):
        raise ValueError(f"export_mixture: gates must have shape [{len(ranks)}], got {list(gates.shape)}")
    if getattr(mllm, "projector_layers", None):
        raise ValueError("export_mixture: each expert owns a projector, and those cannot be mixed; use export_expert")
    weight_R = (gates * torch.tensor(scaling)).repeat_interleave(torch.tensor(ranks))
    layers = {
        path: (layer.lora_a, layer.lora_b.detach().cpu() * weight_R) for path, layer in mllm.expert_layers.items()
    }
    told = ", ".join(f"{gate:g}" for gate in gates.tolist())
    return write_peft_adapter(
        folder,
        layers,
        scaling=1.0,
        description=f"Mixture of {len(ranks)} experts with the constant gates {told}, from a run with mllmcl.",
        projector=_projector(mllm, None),
        **_belongs_to(mllm),
    )


def _merged_note(num_merged: int) -> str:
    if not num_merged:
        return ""
    return (
        f" It does not go on the published base: experts were merged into the weights of its linears {num_merged} "
        "times before, and the run's checkpoints hold those weights."
    )


def _experts(mllm) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if mllm.experts is None:
        raise ValueError("the model has no experts to export, call add_experts first")
    return tuple(mllm.experts.ranks), tuple(mllm.experts.scaling)


def _belongs_to(mllm) -> dict:
    """Base model and task type of the config."""
    can_generate = hasattr(mllm.model, "prepare_inputs_for_generation")
    name = getattr(mllm.model, "name_or_path", None)
    return {"base_model": name or None, "task_type": "CAUSAL_LM" if can_generate else None}


def _projector(mllm, expert: int | None) -> dict[str, Tensor]:
    """Parameters of the projector by the names of the base model; empty where the base model's own serves."""
    if mllm.projector_layers:
        own = {}
        for path, layer in mllm.projector_layers.items():
            own[f"{path}.weight"] = layer.expert_weight[expert]
            if layer.expert_bias is not None:
                own[f"{path}.bias"] = layer.expert_bias[expert]
        return own
    if mllm.projector_path is None:
        return {}
    shared = dict(mllm.model.get_submodule(mllm.projector_path).named_parameters(prefix=mllm.projector_path))
    is_composed = not hasattr(mllm.model, "name_or_path")
    return shared if is_composed or any(value.requires_grad for value in shared.values()) else {}


def _routers(mllm) -> dict[str, Tensor]:
    layers = mllm.expert_layers.items()
    return {f"{path}.{name}": value for path, layer in layers for name, value in layer.router_parameters.items()}


def export_run(run: str | os.PathLike, output: str | os.PathLike) -> list[tuple[Path, int]]:
    """Copy every adapter of a run folder to `output`, each checked before and reopened after: (folder, layers).

    Raises:
        FileNotFoundError: the run holds no adapters. ValueError: an adapter is damaged.
    """
    source, target = Path(run) / "adapters", Path(output)
    if not Path(run).is_dir():
        raise FileNotFoundError(f"there is no run folder {run}")
    found = sorted(config.parent for config in source.rglob("adapter_config.json"))
    if not found:
        raise FileNotFoundError(
            f"{source} holds no adapters: a run writes them at the end of each task, where its method has LoRA experts"
        )
    done = []
    for folder in found:
        before = read_adapter(folder)
        copy = target / folder.relative_to(source)
        replace_folder(copy, lambda path, folder=folder: shutil.copytree(folder, path, dirs_exist_ok=True))
        after = read_adapter(copy)
        if after.layers.keys() != before.layers.keys():
            raise ValueError(f"{copy}: has other layers than {folder}")
        done.append((copy, len(after.layers)))
    return done
