"""One checkpoint format, safetensors and JSON under a manifest of sha256 sums: whole or absent, whatever happens.

    checkpoints/000123/   <group>.safetensors ...   state.json   manifest.json

    save_checkpoint("run/checkpoints", 123, {"adapter": tensors}, {"task": 1}, config_sha256=sha)
    loaded = latest_checkpoint("run/checkpoints", config_sha256=sha)    # None: start anew

A checkpoint is written into `.tmp-000123-<pid>`, its manifest last; files and folder are synced, the folder is renamed
and its parent synced. Only then older ones are moved to `.trash-*` and deleted. A reader takes the newest checkpoint of
which every byte is accounted for and says which newer ones it refused. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import fsync_file, fsync_folder, is_alive, remove_leftovers, sha256_file, write_durably

__all__ = [
    "CheckpointError",
    "Loaded",
    "latest_checkpoint",
    "load_optimizer",
    "optimizer_tensors",
    "read_checkpoint",
    "save_checkpoint",
]

logger = logging.getLogger(__name__)

FORMAT = 1
MAX_HEADER_BYTES = 32 << 20
MAX_MANIFEST_BYTES = 16 << 20
_NUMBER = re.compile(r"\d{6,18}")
_OLD = re.compile(r"\.old-(\d{6,18})-(\d+)")
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MANIFEST_KEYS = {"format", "step", "pin", "config_sha256", "files"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used: where it is, what is wrong, what to do."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A verified checkpoint.

    step: its number. tensors: group to name to tensor, on the CPU. state: as JSON gives it back (tuples are lists).
    path: its folder. refused: (path, reason) of each newer checkpoint that could not be used.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict
    path: Path
    refused: tuple[tuple[Path, str], ...] = ()


def save_checkpoint(
    folder: str | os.PathLike,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict,
    *,
    keep: int = 2,
    pin: bool = False,
    config_sha256: str,
) -> Path:
    """Write checkpoint `step` of a run, durably, then delete the ones that are not kept.

    One process at a time may save into a folder (`mllmcl.files.FolderLock`).

    Args:
        folder: of all checkpoints of the run; created if need be.
        step: 0 or more, not below the newest usable checkpoint. The same step again replaces the old one: whenever the
            process dies, the old or the new one is found. Unusable checkpoints with a higher number are moved to
            `.refused-*`, for a resumed run would otherwise have two histories.
        tensors: one file per group, `<group>.safetensors`; groups may be empty, tensors of any shape, dtype, device and
            stride, and may share memory (each is written out in full).
        state: JSON: dict with str keys, list, tuple, str, int, finite float, bool, None.
        keep: how many of the newest to keep, at least 1; 2 leaves one to fall back on.
        pin: keep this one for ever (one per finished task).
        config_sha256: of the resolved config, 64 hexadecimal digits; a run with another config refuses the checkpoint.

    Returns:
        The folder of the checkpoint.

    Raises:
        ValueError, TypeError: a bad argument; nothing was written.
        OSError: the disk is full or not writable; older checkpoints are untouched.
        CheckpointError: a usable checkpoint of a later step is there.
    """
    _check_arguments(step, tensors, state, keep, config_sha256)
    folder = Path(folder)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(folder.parent)
    _recover(folder)
    _set_aside_later(folder, step, config_sha256)
    final = folder / f"{step:06d}"
    temporary = folder / f".tmp-{final.name}-{os.getpid()}"
    try:
        temporary.mkdir()
        _write_files(temporary, step, tensors, state, pin, config_sha256)
        _put_in_place(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(folder)
    _prune(folder, keep)
    return final


def _check_arguments(step, tensors, state, keep, config_sha256) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise ValueError(f"save_checkpoint: step must be an int of 0 or more, got {step!r}")
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise ValueError(f"save_checkpoint: keep must be an int of 1 or more, got {keep!r}")
    _check_sha256(config_sha256, "save_checkpoint")
    for group, named in tensors.items():
        if not isinstance(group, str) or not _GROUP.fullmatch(group):
            raise ValueError(f"save_checkpoint: a group must be named by letters, digits, _ and -, got {group!r}")
        for name, tensor in named.items():
            if not isinstance(name, str) or name == "__metadata__":
                raise ValueError(f"save_checkpoint: tensors[{group!r}]: {name!r} cannot name a tensor")
            if not isinstance(tensor, Tensor) or tensor.is_complex() or tensor.layout != torch.strided:
                what = f"{tensor.dtype}, {tensor.layout}" if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(
                    f"save_checkpoint: tensors[{group!r}][{name!r}] must be a dense real tensor, got {what}"
                )
    if not isinstance(state, dict):
        raise TypeError(f"save_checkpoint: state must be a dict, got {type(state).__name__}")
    _check_json(state, "state")


def _check_sha256(value: object, caller: str) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{caller}: config_sha256 must be 64 lower case hexadecimal digits, got {value!r}")


def _check_json(value: object, where: str) -> None:
    """Refuse what JSON would lose or change: keys that are not str, NaN, arrays, objects."""
    if value is None or isinstance(value, (str, bool, int)):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"save_checkpoint: {where} is {value}, which JSON cannot hold")
    elif isinstance(value, dict):
        for key, member in value.items():
            if not isinstance(key, str):
                raise TypeError(f"save_checkpoint: {where} has the key {key!r}; keys must be str")
            _check_json(member, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, member in enumerate(value):
            _check_json(member, f"{where}[{index}]")
    else:
        raise TypeError(f"save_checkpoint: {where} is a {type(value).__name__}, which JSON cannot hold")


def _write_files(folder: Path, step, tensors, state, pin, config_sha256) -> None:
    """All files of a checkpoint into `folder`, each synced, the manifest last."""
    write_durably(folder / "state.json", json.dumps(state, allow_nan=False))
    for group, named in tensors.items():
        path = folder / f"{group}.safetensors"
        try:
            safetensors.torch.save_file(_separate(named), path)
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error
        # safetensors lets only the owner read its files; they follow the umask like the others
        shutil.copymode(folder / "state.json", path)
        fsync_file(path)
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"sha256": sha256_file(path), "size": path.stat().st_size}
    manifest = {"format": FORMAT, "step": step, "pin": bool(pin), "config_sha256": config_sha256, "files": files}
    write_durably(folder / "manifest.json", json.dumps(manifest, indent=1))
    fsync_folder(folder)


def _separate(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, no two in one storage (safetensors refuses those)."""
    separate, storages = {}, set()
    for name, tensor in named.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        separate[name] = tensor
    return separate


def _put_in_place(temporary: Path, final: Path) -> None:
    """Rename `temporary` to `final`. A folder cannot be renamed over another, so one that is there steps aside first;
    `_recover` brings it back after a kill between the two renames."""
    old = final.with_name(f".old-{final.name}-{os.getpid()}")
    if final.exists():
        os.replace(final, old)
    try:
        os.replace(temporary, final)
    except BaseException:
        if old.exists():
            os.replace(old, final)
        raise


def _checkpoints(folder: Path) -> list[Path]:
    """Everything with the name of a checkpoint, oldest first."""
    return sorted((path for path in folder.iterdir() if _NUMBER.fullmatch(path.name)), key=lambda path: int(path.name))


def _recover(folder: Path) -> None:
    """Undo what a dead process left half done, and delete its remains (and this process's own)."""
    for path in sorted(folder.iterdir()):
        match = _OLD.fullmatch(path.name)
        if match is None or (int(match[2]) != os.getpid() and is_alive(int(match[2]))):
            continue
        if (folder / match[1]).exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, folder / match[1])
    remove_leftovers(folder)


def _set_aside_later(folder: Path, step: int, config_sha256: str) -> None:
    """Move unusable checkpoints of later steps to `.refused-*`; a usable one is an error, never lost."""
    for path in _checkpoints(folder):
        if int(path.name) <= step:
            continue
        try:
            _read(path, config_sha256)
        except CheckpointError as error:
            logger.warning("%s is set aside: %s", path, error)
            os.replace(path, folder / f".refused-{path.name}-{os.getpid()}-{path.stat().st_mtime_ns}")
        else:
            raise CheckpointError(
                f"{path}: a usable checkpoint of a later step than {step}; resume from it, or use another folder"
            )


def _prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the pinned ones; what cannot be deleted now is tried again next time."""
    for path in _checkpoints(folder)[:-keep]:
        if not _is_pinned(path):
            os.replace(path, folder / f".trash-{path.name}-{os.getpid()}")
    _recover(folder)


def _is_pinned(path: Path) -> bool:
    try:
        return _read_manifest(path)["pin"]
    except CheckpointError:
        # of no use, but not proven to be superfluous either
        return True


def latest_checkpoint(folder: str | os.PathLike, *, config_sha256: str) -> Loaded | None:
    """The newest checkpoint of which every byte is as it was written; None if there has never been one.

    Cleans up after dead processes first, so call it where no other thread or process is saving. Each refused checkpoint
    is logged as a warning and listed in `Loaded.refused`.

    Raises:
        CheckpointError: something is there, but no usable checkpoint: never a silent fresh start.
    """
    _check_sha256(config_sha256, "latest_checkpoint")
    folder = Path(folder)
    if not folder.exists():
        return None
    _recover(folder)
    refused: list[tuple[Path, str]] = []
    for path in reversed(_checkpoints(folder)):
        try:
            step, tensors, state = _read(path, config_sha256)
        except CheckpointError as error:
            logger.warning("checkpoint refused: %s", error)
            refused.append((path, str(error)))
        else:
            return Loaded(step=step, tensors=tensors, state=state, path=path, refused=tuple(refused))
    if refused:
        reasons = "\n  ".join(reason for _, reason in refused)
        raise CheckpointError(
            f"{folder}: none of the {len(refused)} checkpoints can be used:\n  {reasons}\n"
            "Restore one from a copy, or move the folder away to start anew."
        )
    others = [path.name for path in folder.iterdir() if path.name.startswith(".refused-") or path.name[0] != "."]
    if others:
        raise CheckpointError(
            f"{folder}: holds {', '.join(sorted(others)[:3])} but no checkpoint; move the folder away to start anew"
        )
    return None


def read_checkpoint(path: Path, *, config_sha256: str) -> Loaded:
    """One checkpoint, for a process beside the one that looks after the folder; CheckpointError if it is no good."""
    step, tensors, state = _read(path, config_sha256)
    return Loaded(step=step, tensors=tensors, state=state, path=path, refused=())


def _read(path: Path, config_sha256: str) -> tuple[int, dict[str, dict[str, Tensor]], dict]:
    """Step, tensors and state of one checkpoint; CheckpointError if anything about it is wrong."""
    manifest = _read_manifest(path)
    if manifest["config_sha256"] != config_sha256:
        raise CheckpointError(
            f"{path}: belongs to a run with another config (sha256 {manifest['config_sha256'][:12]}..., this run has "
            f"{config_sha256[:12]}...); restore the config or use another folder"
        )
    files = manifest["files"]
    try:
        found = {entry.name: entry for entry in path.iterdir()}
        for name, entry in found.items():
            if name not in files and name != "manifest.json":
                raise CheckpointError(f"{path}: {name} is not in the manifest; remove it or the checkpoint")
            if entry.is_symlink() or not entry.is_file():
                raise CheckpointError(f"{path}: {name} is not a regular file; restore it or remove the checkpoint")
        for name, facts in files.items():
            if name not in found:
                raise CheckpointError(f"{path}: {name} is missing; restore it or remove the checkpoint")
            if found[name].stat().st_size != facts["size"]:
                raise CheckpointError(
                    f"{path}: {name} has {found[name].stat().st_size} bytes, the manifest says {facts['size']}; "
                    "restore it or remove the checkpoint"
                )
        tensors, state = {}, {}
        for name in files:
            data = (path / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
                raise CheckpointError(
                    f"{path}: {name} has another sha256 than the manifest says; restore it or remove the checkpoint"
                )
            if name == "state.json":
                state = _parse_json(data, path / name)
            else:
                tensors[name.removesuffix(".safetensors")] = _parse_safetensors(data, path / name)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); mend that or remove the checkpoint") from error
    return manifest["step"], tensors, state


def _read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint, every field checked, before any other file is looked at."""
    file = path / "manifest.json"
    try:
        if path.is_symlink() or file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{path}: has no manifest.json, so it was never finished; remove it")
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise CheckpointError(f"{file}: has {file.stat().st_size} bytes; remove the checkpoint")
        manifest = _parse_json(file.read_bytes(), file)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); mend that or remove the checkpoint") from error
    if manifest.keys() != _MANIFEST_KEYS or manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{file}: is of format {manifest.get('format')!r} with fields {', '.join(sorted(manifest))[:200]}; this "
            f"version reads format {FORMAT}; use the version that wrote it, or remove the checkpoint"
        )
    files = manifest["files"]
    good = (
        manifest["step"] == int(path.name)
        and isinstance(manifest["pin"], bool)
        and isinstance(manifest["config_sha256"], str)
        and isinstance(files, dict)
        and "state.json" in files
        and all(_is_entry(facts) for facts in files.values())
    )
    if not good:
        raise CheckpointError(f"{file}: has a field of the wrong kind; restore it or remove the checkpoint")
    for name in files:
        group = name.removesuffix(".safetensors")
        if name != "state.json" and not (name != group and _GROUP.fullmatch(group)):
            raise CheckpointError(f"{file}: lists {name[:100]!r}, which no checkpoint holds; remove the checkpoint")
    return manifest


def _is_entry(facts: object) -> bool:
    return (
        isinstance(facts, dict)
        and facts.keys() == {"sha256", "size"}
        and isinstance(facts["sha256"], str)
        and type(facts["size"]) is int
    )


def _parse_json(data: bytes, path: Path) -> dict:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); restore it or remove the checkpoint") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object; restore it or remove the checkpoint")
    return value


def _parse_safetensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """Tensors of one file. The header's length is looked at first: it decides how much a parser would read."""
    header = int.from_bytes(data[:8], "little")
    if len(data) < 8 or header > min(MAX_HEADER_BYTES, len(data) - 8):
        raise CheckpointError(
            f"{path}: is not a safetensors file of a checkpoint: claims a header of {header} bytes in a file of "
            f"{len(data)}, and at most {MAX_HEADER_BYTES} are read; remove the checkpoint"
        )
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file ({error}); remove the checkpoint") from error


# -- optimizers


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[Tensor, str]) -> tuple[dict[str, Tensor], dict]:
    """The state of an optimizer as tensors `<parameter>/<key>` (`step`, `exp_avg`, `exp_avg_sq`) and JSON, not copied.

    Written for the layout of `torch.optim.AdamW` and those like it: per parameter numbers, 0-dim tensors and tensors of
    the parameter's shape. An optimizer that has not stepped yet has no tensors, and none are made up.

    Args:
        names: parameter to name, of at least all parameters of `optimizer`; no name twice.

    Raises:
        ValueError: a parameter without a name, a name used twice, or state of another layout.
    """
    tensors: dict[str, Tensor] = {}
    slots: dict[str, dict] = {}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        options = {}
        for key, value in group.items():
            if key == "params":
                options[key] = [_name_of(parameter, names) for parameter in value]
            elif isinstance(value, Tensor):
                tensors[f"group {index}/{key}"] = value
            else:
                _check_json(value, f"optimizer.param_groups[{index}][{key!r}]")
                options[key] = value
        groups.append(options)
    everybody = [name for group in groups for name in group["params"]]
    if len(set(everybody)) != len(everybody):
        twice = next(name for name in everybody if everybody.count(name) > 1)
        raise ValueError(f"optimizer_tensors: names: {twice!r} names two parameters")
    for parameter, state in optimizer.state.items():
        name = _name_of(parameter, names)
        slots[name] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                if value.dim() and value.shape != parameter.shape:
                    raise ValueError(
                        f"optimizer_tensors: state {key!r} of {name} has shape {list(value.shape)}, expected none or "
                        f"{list(parameter.shape)}"
                    )
                tensors[f"{name}/{key}"] = value
                slots[name][key] = "like parameter" if value.shape == parameter.shape else "0-dim"
            else:
                _check_json(value, f"optimizer state {key!r} of {name}")
                slots[name][key] = {"value": value}
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "slots": slots}


def _name_of(parameter: Tensor, names: dict[Tensor, str]) -> str:
    if parameter not in names:
        raise ValueError(f"names: has no name for a parameter of shape {list(parameter.shape)} of the optimizer")
    return names[parameter]


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], state: dict, names: dict[Tensor, str]
) -> None:
    """Give `optimizer` exactly the state that `optimizer_tensors` took; what it had before is dropped.

    Moments keep the dtype they were saved in. Everything is checked before anything is changed.

    Raises:
        CheckpointError: another optimizer class, other groups, parameters or options, a missing or left-over tensor, or
            another shape; the message names it.
        ValueError: a parameter without a name.
    """
    own = {_name_of(parameter, names): parameter for group in optimizer.param_groups for parameter in group["params"]}
    _check_groups(optimizer, state, names)
    _refuse_difference("parameters of the optimizer", set(state["slots"]) - own.keys(), set())
    _check_slots(optimizer, tensors, state["slots"], own)
    for index, (group, saved) in enumerate(zip(optimizer.param_groups, state["groups"], strict=True)):
        for key in group.keys() - saved.keys():
            group[key].copy_(tensors[f"group {index}/{key}"])
        for key in saved.keys() - {"params"}:
            group[key] = tuple(saved[key]) if isinstance(group.get(key), tuple) else saved[key]
    # torch keeps the step count on the CPU unless the whole step runs on the device
    on_device = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
    optimizer.state.clear()
    for name, kept in state["slots"].items():
        for key, kind in kept.items():
            value = tensors[f"{name}/{key}"].clone() if isinstance(kind, str) else kind["value"]
            if isinstance(value, Tensor) and (key != "step" or on_device):
                value = value.to(own[name].device)
            optimizer.state[own[name]][key] = value


def _check_slots(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], slots: dict, own: dict) -> None:
    """That every tensor that was saved is there, none else, and each has its shape."""
    expected = {f"{name}/{key}": (name, kind) for name, kept in slots.items() for key, kind in kept.items()}
    expected = {place: what for place, what in expected.items() if isinstance(what[1], str)}
    options = {f"group {index}/{key}" for index, key in _tensor_options(optimizer)}
    _refuse_difference("tensors of the optimizer", expected.keys() | options, set(tensors))
    for place, (name, kind) in expected.items():
        shape = own[name].shape if kind == "like parameter" else ()
        if tensors[place].shape != shape:
            raise CheckpointError(
                f"optimizer: {place} has shape {list(tensors[place].shape)}, expected {list(shape)}; resume with the "
                "model that was saved"
            )


def _tensor_options(optimizer: torch.optim.Optimizer) -> list[tuple[int, str]]:
    groups = enumerate(optimizer.param_groups)
    return [(index, key) for index, group in groups for key in group if isinstance(group[key], Tensor)]


def _check_groups(optimizer: torch.optim.Optimizer, state: dict, names: dict[Tensor, str]) -> None:
    """That the optimizer is of the class, has the groups, their parameters and their options that were saved."""
    kind, groups = type(optimizer).__name__, optimizer.param_groups
    if state["class"] != kind or len(state["groups"]) != len(groups):
        raise CheckpointError(
            f"optimizer: a {state['class']} with {len(state['groups'])} groups was saved, this is a {kind} with "
            f"{len(groups)}; resume with the optimizer that was saved"
        )
    for index, (group, saved) in enumerate(zip(groups, state["groups"], strict=True)):
        own = {_name_of(parameter, names) for parameter in group["params"]}
        _refuse_difference(f"parameters of optimizer group {index}", set(saved["params"]), own)
        # a scheduler adds options, so those of the saved one may be more
        missing = {key for key in group if not isinstance(group[key], Tensor)} - saved.keys()
        if missing:
            raise CheckpointError(
                f"optimizer: group {index} has the options {', '.join(sorted(missing)[:3])}, which were not saved; "
                "resume with the optimizer and torch version that wrote the checkpoint"
            )


def _refuse_difference(what: str, saved: set[str], own: set[str]) -> None:
    for side, names in (("were saved and are missing", saved - own), ("were not saved", own - saved)):
        if names:
            raise CheckpointError(
                f"optimizer: {len(names)} {what} {side}, first {', '.join(sorted(names)[:3])}; resume with what was "
                "saved"
            )
