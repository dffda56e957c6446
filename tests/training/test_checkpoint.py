"""Checkpoints: killed anywhere, damaged anyhow, on a full or read-only disk; optimizers that continue bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mllmcl.training.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    save_checkpoint,
)
from mllmcl_kernels import MaskedAdamW

SHA, OTHER_SHA = "a" * 64, "b" * 64
CRASHED, FAILED = 77, 99


def content(value: int, size: int = 64) -> tuple[dict, dict]:
    """Tensors and state of which every byte depends on `value`."""
    tensors = {
        "adapter": {"a": torch.full((size,), float(value)), "b": torch.arange(size) + value},
        "optimizer": {"step": torch.tensor(value)},
    }
    return tensors, {"value": value, "text": f"state {value}"}


def save(folder, step: int, value: int | None = None, sha: str = SHA, **options) -> Path:
    return save_checkpoint(folder, step, *content(step if value is None else value), config_sha256=sha, **options)


def value_of(loaded, size: int = 64) -> int:
    """The value that a checkpoint holds, after looking at every part of it."""
    value = loaded.state["value"]
    tensors, state = content(value, size)
    assert loaded.state == state
    assert loaded.tensors.keys() == tensors.keys()
    for group, named in tensors.items():
        assert loaded.tensors[group].keys() == named.keys()
        assert all(torch.equal(loaded.tensors[group][name], tensor) for name, tensor in named.items())
    return value


def latest(folder, sha: str = SHA):
    return latest_checkpoint(folder, config_sha256=sha)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def in_child(work) -> int:
    """Run `work` in a forked process; its exit status, negative if a signal ended it."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        # the threads of a pool do not live on in a fork, so nothing may be handed to them
        torch.set_num_threads(1)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(FAILED)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- the format


def test_round_trip(tmp_path):
    square = torch.randn(4, 6)
    tensors = {
        "adapter": {
            "whole": square,
            "rows": square[1:3],
            "transposed": square.T,
            "again": square,
            "expanded": torch.ones(1).expand(5),
            "number": torch.tensor(3.5),
            "none": torch.empty(0, 3),
            "flags": torch.tensor([True, False]),
            "ids": torch.tensor([-1, 2**62]),
            "half": square.to(torch.bfloat16),
            "parameter": torch.nn.Parameter(square.double()),
        },
        "empty": {},
    }
    state = {"task": 1, "text": "e\u0301 \u4e2d", "list": [1, 2.5, None, True, {"a": []}], "tuple": (1, 2)}
    path = save_checkpoint(tmp_path / "run" / "checkpoints", 7, tensors, state, config_sha256=SHA)
    assert path.name == "000007"
    assert names(path) == ["adapter.safetensors", "empty.safetensors", "manifest.json", "state.json"]
    loaded = latest(path.parent)
    assert (loaded.step, loaded.path, loaded.refused) == (7, path, ())
    assert loaded.state == {**state, "tuple": [1, 2]}
    assert loaded.tensors["empty"] == {}
    assert loaded.tensors["adapter"].keys() == tensors["adapter"].keys()
    for name, tensor in tensors["adapter"].items():
        got = loaded.tensors["adapter"][name]
        assert got.dtype == tensor.dtype and torch.equal(got, tensor), name


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


def test_nothing_there_is_none(tmp_path):
    assert latest(tmp_path / "missing") is None
    assert latest(tmp_path) is None


def test_keeps_the_newest_and_the_pinned(tmp_path):
    for step in range(6):
        save(tmp_path, step, pin=step in (1, 3))
    assert names(tmp_path) == ["000001", "000003", "000004", "000005"]
    save(tmp_path, 10, keep=1)
    assert names(tmp_path) == ["000001", "000003", "000010"]
    assert value_of(latest(tmp_path)) == 10


def test_same_step_replaces(tmp_path):
    save(tmp_path, 5, 1)
    save(tmp_path, 5, 2)
    assert names(tmp_path) == ["000005"]
    assert value_of(latest(tmp_path)) == 2


def test_earlier_step_is_refused_while_a_later_one_is_good(tmp_path):
    save(tmp_path, 9)
    with pytest.raises(CheckpointError, match="000009: a usable checkpoint of a later step than 5"):
        save(tmp_path, 5)
    assert names(tmp_path) == ["000009"]


def test_damaged_later_checkpoint_is_set_aside(tmp_path):
    save(tmp_path, 5)
    (save(tmp_path, 9) / "state.json").write_text("{}")
    assert latest(tmp_path).step == 5
    save(tmp_path, 6)
    assert [name.split("-")[:2] for name in names(tmp_path)] == [[".refused", "000009"], ["000005"], ["000006"]]
    assert latest(tmp_path).step == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be"),
        ({"step": 1.0}, ValueError, "step must be"),
        ({"keep": 0}, ValueError, "keep must be"),
        ({"config_sha256": "abc"}, ValueError, "config_sha256 must be 64"),
        ({"tensors": {"../up": {}}}, ValueError, r"'\.\./up'"),
        ({"tensors": {"": {}}}, ValueError, "group must be named"),
        ({"tensors": {"a": {"__metadata__": torch.zeros(1)}}}, ValueError, "cannot name a tensor"),
        ({"tensors": {"a": {"x": 1.0}}}, TypeError, r"tensors\['a'\]\['x'\] must be a dense real tensor, got float"),
        ({"tensors": {"a": {"x": torch.zeros(1, dtype=torch.complex64)}}}, TypeError, "complex64"),
        ({"tensors": {"a": {"x": torch.zeros(2, 2).to_sparse()}}}, TypeError, "sparse"),
        ({"state": {"a": {"b": [0.0, float("nan")]}}}, ValueError, r"state\['a'\]\['b'\]\[1\] is nan"),
        ({"state": {"a": {1: 2}}}, TypeError, r"state\['a'\] has the key 1"),
        ({"state": {"a": torch.zeros(1)}}, TypeError, r"state\['a'\] is a Tensor"),
        ({"state": []}, TypeError, "state must be a dict"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, change, error, message):
    arguments = {"step": 1, "tensors": {}, "state": {}, "config_sha256": SHA, **change}
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path / "c", **arguments)
    assert names(tmp_path) == []


# -- killed


def crash_at(point: int) -> None:
    """End this process, as by SIGKILL, just before its `point`-th file-system event from now on."""
    seen = 0

    def event() -> bool:
        nonlocal seen
        seen += 1
        return seen == point

    def hook(name: str, arguments: tuple) -> None:
        writes = name == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if (writes or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and event():
            os._exit(CRASHED)

    sync, write = os.fsync, safetensors.torch.save_file

    def fsync(descriptor) -> None:
        if event():
            os._exit(CRASHED)
        sync(descriptor)

    def save_file(tensors, path) -> None:
        if event():
            data = safetensors.torch.save(tensors)
            Path(path).write_bytes(data[: len(data) // 2])
            os._exit(CRASHED)
        write(tensors, path)

    os.fsync, safetensors.torch.save_file = fsync, save_file
    sys.addaudithook(hook)


SCENES = {
    # steps saved before, the step whose saving is killed, what may be found (values are step, or 100 + step for new)
    "first of all": ([], 1, {None, 101}),
    "next": ([1], 2, {1, 102}),
    "next, with pruning": ([1, 2], 3, {2, 103}),
    "same step again": ([1, 2], 2, {2, 102}),
    "same step, the only one": ([1], 1, {1, 101}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_every_crash_point(tmp_path, scene):
    before, step, allowed = SCENES[scene]
    found, status, point = [], CRASHED, 0
    while status == CRASHED:
        point += 1
        folder = tmp_path / str(point)
        for earlier in before:
            save(folder, earlier)

        def work(folder=folder, point=point):
            crash_at(point)
            save(folder, step, 100 + step)

        status = in_child(work)
        loaded = latest(folder)
        found.append(None if loaded is None else value_of(loaded))
        assert found[-1] in allowed, f"crash point {point}: found {found[-1]}"
        assert loaded is None or loaded.refused == ()
        assert not folder.exists() or all(name[0] != "." for name in names(folder)), f"crash point {point}: leftovers"
        save(folder, step + 1)
        assert value_of(latest(folder)) == step + 1
    assert status == 0
    assert point > 8
    assert set(found) == allowed
    # once new, always new: there is one moment at which the new checkpoint appears
    assert found == sorted(found, key=lambda value: value == 100 + step)


def test_crash_while_recovering(tmp_path):
    """A second kill, at any event of the clean-up after the first."""
    first, num_pairs = CRASHED, 0
    for point in range(1, 100):
        second, inner = CRASHED, 0
        while second == CRASHED:
            inner += 1
            folder = tmp_path / f"{point}-{inner}"
            save(folder, 1)

            def work(folder=folder, point=point):
                crash_at(point)
                save(folder, 1, 2)

            def recover(folder=folder, inner=inner):
                crash_at(inner)
                latest(folder)

            first = in_child(work)
            second = in_child(recover)
            assert value_of(latest(folder)) in (1, 2)
            num_pairs += 1
        assert second == 0
        if first == 0:
            break
    assert first == 0 and num_pairs > 20


def test_order_of_events(tmp_path):
    """What a kill cannot show, but a power cut would: everything is synced before the rename, pruning comes last."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    log = tmp_path.parent / "log"

    def work():
        events = []
        sync = os.fsync

        def fsync(descriptor):
            events.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
            sync(descriptor)

        os.fsync = fsync
        sys.addaudithook(
            lambda name, arguments: name == "os.rename" and events.append(("rename", os.path.basename(arguments[1])))
        )
        save(tmp_path, 3)
        log.write_text(json.dumps([[kind, name.replace(str(os.getpid()), "PID")] for kind, name in events]))

    assert in_child(work) == 0
    assert [tuple(event) for event in json.loads(log.read_text())] == [
        ("sync", "state.json"),
        ("sync", "adapter.safetensors"),
        ("sync", "optimizer.safetensors"),
        ("sync", "manifest.json"),
        ("sync", ".tmp-000003-PID"),
        ("rename", "000003"),
        ("sync", tmp_path.name),
        ("rename", ".trash-000001-PID"),
    ]


def test_killed_at_random_moments(tmp_path):
    """A second process saves without a pause and is killed: what it had confirmed is there, whole."""
    draw = random.Random(0)
    size, step = 20_000, 0
    for _ in range(12):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            try:
                for number in range(step + 1, step + 10_000):
                    tensors, state = content(number, size)
                    save_checkpoint(tmp_path, number, tensors, state, config_sha256=SHA)
                    os.write(writing, b"%d\n" % number)
            finally:
                os._exit(FAILED)
        os.close(writing)
        time.sleep(draw.uniform(0.05, 0.25))
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with os.fdopen(reading, "rb") as pipe:
            confirmed = [int(line) for line in pipe.read().splitlines()]
        loaded = latest(tmp_path)
        if confirmed:
            assert loaded.step in (confirmed[-1], confirmed[-1] + 1)
        if loaded is not None:
            assert loaded.refused == ()
            assert value_of(loaded, size) == loaded.step >= step
            step = loaded.step
    assert step > 20


def test_cleans_up_after_the_dead_only(tmp_path):
    save(tmp_path, 1)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitpid(dead, 0)
    for pid in (dead, os.getppid(), os.getpid()):
        (tmp_path / f".tmp-000002-{pid}").mkdir()
        (tmp_path / f".trash-000000-{pid}").mkdir()
        (tmp_path / f".trash-000000-{pid}" / "state.json").write_text("{}")
    assert latest(tmp_path).step == 1
    assert names(tmp_path) == [f".tmp-000002-{os.getppid()}", f".trash-000000-{os.getppid()}", "000001"]


# -- damaged


def flip(file: Path, bit: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    bit = len(data) * 4 + 1 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def rewrite(path: Path, change) -> None:
    """Change the manifest as somebody who knows the format would."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def plant(path: Path, name: str, data: bytes) -> None:
    """Put a file into a checkpoint, with a manifest that vouches for it."""
    (path / name).write_bytes(data)
    facts = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    rewrite(path, lambda manifest: manifest["files"].update({name: facts}))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def other_run(path: Path) -> Path:
    """A checkpoint of the same shape from another run."""
    return save(path.parent.parent / "other", 2, 77)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_link(file: Path) -> None:
    shutil.move(file, file.parent.parent / "elsewhere.bin")
    file.symlink_to(file.parent.parent / "elsewhere.bin")


ADAPTER = "adapter.safetensors"
DAMAGES = {
    "shard truncated": (
        lambda path: truncate(path / ADAPTER),
        "adapter.safetensors has 895 bytes, the manifest says 896",
    ),
    "shard empty": (lambda path: os.truncate(path / ADAPTER, 0), "adapter.safetensors has 0 bytes"),
    "shard longer": (lambda path: (path / ADAPTER).open("ab").write(b"x"), "adapter.safetensors has 897 bytes"),
    "shard bit": (lambda path: flip(path / ADAPTER), "adapter.safetensors has another sha256"),
    "state truncated": (lambda path: truncate(path / "state.json"), "state.json has"),
    "state bit": (lambda path: flip(path / "state.json"), "state.json has another sha256"),
    "manifest truncated": (lambda path: truncate(path / "manifest.json"), "manifest.json: is not JSON"),
    "manifest empty": (lambda path: os.truncate(path / "manifest.json", 0), "manifest.json: is not JSON"),
    "manifest bit": (lambda path: flip(path / "manifest.json", 8), "manifest.json"),
    "shard deleted": (lambda path: (path / ADAPTER).unlink(), "adapter.safetensors is missing"),
    "state deleted": (lambda path: (path / "state.json").unlink(), "state.json is missing"),
    "manifest deleted": (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
    "shard of another run": (lambda path: shutil.copy(other_run(path) / ADAPTER, path), "adapter.safetensors has anot"),
    "state of another run": (lambda path: shutil.copy(other_run(path) / "state.json", path), "state.json has"),
    "shards swapped": (lambda path: shutil.copy(path / "optimizer.safetensors", path / ADAPTER), "adapter.safetensors"),
    "unknown file": (lambda path: (path / "extra.bin").write_bytes(b"x"), "extra.bin is not in the manifest"),
    "folder as shard": (lambda path: replace_by_folder(path / ADAPTER), "adapter.safetensors is not a regular file"),
    "link as shard": (lambda path: replace_by_link(path / ADAPTER), "adapter.safetensors is not a regular file"),
    "pickle as shard": (
        lambda path: (path / ADAPTER).write_bytes(pickle.dumps(Bomb())),
        "adapter.safetensors has",
    ),
    "pickle, vouched for": (
        lambda path: plant(path, ADAPTER, pickle.dumps(Bomb()) + bytes(64)),
        "adapter.safetensors: is not a safetensors file",
    ),
    "torch.save, vouched for": (
        lambda path: (
            torch.save(Bomb(), path / "x"),
            plant(path, ADAPTER, (path / "x").read_bytes()),
            (path / "x").unlink(),
        ),
        "adapter.safetensors: is not a safetensors file",
    ),
    "header of 200 MB": (
        lambda path: plant(path, ADAPTER, (200 << 20).to_bytes(8, "little") + b"{" + bytes(100)),
        "adapter.safetensors: .* header of 209715200 bytes",
    ),
    "header that is no JSON": (
        lambda path: plant(path, ADAPTER, (8).to_bytes(8, "little") + b"deadbeef"),
        "adapter.safetensors: is not a safetensors file",
    ),
    "state nested deeply": (
        lambda path: plant(path, "state.json", b'{"a":' * 200_000),
        "state.json: is not JSON",
    ),
    "state is a list": (lambda path: plant(path, "state.json", b"[]"), "state.json: holds no JSON object"),
    "upward name": (
        lambda path: rewrite(path, lambda m: m["files"].update({"../000001/state.json": m["files"]["state.json"]})),
        r"lists '\.\./000001/state\.json'",
    ),
    "absolute name": (
        lambda path: rewrite(path, lambda m: m["files"].update({"/etc/passwd": m["files"]["state.json"]})),
        "lists '/etc/passwd'",
    ),
    "python file, vouched for": (lambda path: plant(path, "conftest.py", b"pass"), "lists 'conftest.py'"),
    "state not listed": (lambda path: rewrite(path, lambda m: m["files"].pop("state.json")), "field of the wrong kind"),
    "other format": (lambda path: rewrite(path, lambda m: m.update(format=2)), "of format 2"),
    "other step": (lambda path: rewrite(path, lambda m: m.update(step=1)), "field of the wrong kind"),
    "size a string": (lambda path: rewrite(path, lambda m: m["files"][ADAPTER].update(size="9")), "of the wrong kind"),
    "field added": (lambda path: rewrite(path, lambda m: m.update(more=1)), "with fields config_sha256"),
    "other config": (lambda path: rewrite(path, lambda m: m.update(config_sha256=OTHER_SHA)), "another config"),
    "file as checkpoint": (lambda path: (shutil.rmtree(path), path.write_bytes(b"")), "has no manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(tmp_path, monkeypatch, caplog, damage):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    folder = tmp_path / "checkpoints"
    save(folder, 1)
    path = save(folder, 2)
    change, message = DAMAGES[damage]
    change(path)
    loaded = latest(folder)
    assert value_of(loaded) == 1
    assert [refused for refused, _ in loaded.refused] == [path]
    reason = loaded.refused[0][1]
    assert str(path) in reason
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(reason)
    assert reason in caplog.text
    assert not (tmp_path / "bomb").exists()
    shutil.rmtree(folder / "000001")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints can be used") as caught:
        latest(folder)
    assert reason in str(caught.value) and "move the folder away" in str(caught.value)
    # and the run that fell back can go on and save this step again
    save(folder, 2, 5)
    assert value_of(latest(folder)) == 5


def test_every_flipped_bit_is_noticed(tmp_path):
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    draw = random.Random(0)
    files = sorted(path.iterdir())
    assert len(files) == 4
    for _ in range(300):
        file = draw.choice(files)
        whole = file.read_bytes()
        bit = draw.randrange(len(whole) * 8)
        flip(file, bit)
        loaded = latest(tmp_path)
        assert loaded.step == 1, f"bit {bit} of {file.name} flipped unnoticed"
        assert file.name in loaded.refused[0][1] or file.name == "manifest.json"
        file.write_bytes(whole)
    assert latest(tmp_path).step == 2


def test_another_config(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match=r"another config \(sha256 aaaaaaaaaaaa\.\.\., this run has bbbbbbbbbbbb"):
        latest(tmp_path, OTHER_SHA)
    with pytest.raises(ValueError, match="config_sha256"):
        latest_checkpoint(tmp_path, config_sha256="")


def test_something_else_in_the_folder_is_no_fresh_start(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    with pytest.raises(CheckpointError, match="holds checkpoint-500 but no checkpoint"):
        latest(tmp_path)


# -- the disk says no


def test_disk_full(tmp_path):
    """Each file in turn is the one that does not fit; the error names it, and the older checkpoint stands."""
    save(tmp_path, 1)

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        big = {"adapter": {"a": torch.zeros(100_000)}}
        for tensors, state, name in ((big, {}, ADAPTER), ({}, {"a": "x" * 100_000}, "state.json")):
            try:
                save_checkpoint(tmp_path, 2, tensors, state, config_sha256=SHA)
            except OSError as error:
                assert str(tmp_path) in str(error) and name in str(error), error
                assert "large" in str(error)
            else:
                raise AssertionError("no error")
            assert names(tmp_path) == ["000001"]

    assert in_child(work) == 0
    assert value_of(latest(tmp_path)) == 1


def test_read_only_folder():
    # not tmp_path, which other users may not enter
    folder = Path(tempfile.mkdtemp())
    try:
        save(folder, 1)
        folder.chmod(0o555)

        def work():
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                save(folder, 2)
            except PermissionError as error:
                assert str(folder) in str(error)
            else:
                raise AssertionError("no error")
            assert value_of(latest(folder)) == 1

        assert in_child(work) == 0
        assert names(folder) == ["000001"]
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_unreadable_file_is_refused(tmp_path, monkeypatch):
    """An error of the disk while reading, as from a bad sector."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    read = Path.read_bytes

    def failing(file):
        if file == path / ADAPTER:
            raise OSError(5, "Input/output error", str(file))
        return read(file)

    monkeypatch.setattr(Path, "read_bytes", failing)
    loaded = latest(tmp_path)
    assert loaded.step == 1 and "Input/output error" in loaded.refused[0][1]


# -- optimizers


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2), torch.nn.Linear(2, 2))


def make_optimizer(kind: str, model) -> torch.optim.Optimizer:
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.1}]
    makers = {
        "AdamW": lambda: torch.optim.AdamW(groups, lr=1e-2),
        "AdamW, amsgrad, lr tensor": lambda: torch.optim.AdamW(groups, lr=torch.tensor(1e-2), amsgrad=True),
        "MaskedAdamW": lambda: MaskedAdamW(groups, lr=1e-2, max_norm=1.0),
        "MaskedAdamW, bf16": lambda: MaskedAdamW(groups, lr=1e-2, state_dtype=torch.bfloat16),
        "SGD": lambda: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    }
    return makers[kind]()


def names_of(model) -> dict:
    return {parameter: name for name, parameter in model.named_parameters()}


def steps(model, optimizer, scheduler, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        scheduler.step()


def scheduler_for(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))


@pytest.mark.parametrize("cut", [0, 1, 6])
@pytest.mark.parametrize("kind", ["AdamW", "AdamW, amsgrad, lr tensor", "MaskedAdamW", "MaskedAdamW, bf16", "SGD"])
def test_optimizer_continues_bit_for_bit(tmp_path, kind, cut):
    unbroken = make_model()
    optimizer = make_optimizer(kind, unbroken)
    steps(unbroken, optimizer, scheduler_for(optimizer), 0, 12)

    model = make_model()
    optimizer = make_optimizer(kind, model)
    scheduler = scheduler_for(optimizer)
    steps(model, optimizer, scheduler, 0, cut)
    tensors, slots = optimizer_tensors(optimizer, names_of(model))
    schedule = {key: value for key, value in scheduler.state_dict().items() if key in ("last_epoch", "_step_count")}
    weights = dict(model.named_parameters())
    save_checkpoint(
        tmp_path,
        cut,
        {"model": weights, "optimizer": tensors},
        {"optimizer": slots, "schedule": schedule},
        config_sha256=SHA,
    )

    loaded = latest(tmp_path)
    model = make_model()
    model.load_state_dict(loaded.tensors["model"])
    optimizer = make_optimizer(kind, model)
    scheduler = scheduler_for(optimizer)
    scheduler.load_state_dict({**scheduler.state_dict(), **loaded.state["schedule"]})
    load_optimizer(optimizer, loaded.tensors["optimizer"], loaded.state["optimizer"], names_of(model))
    steps(model, optimizer, scheduler, cut, 12)
    for name, value in unbroken.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name


def test_reading_an_optimizer_does_not_change_it():
    model = make_model()
    optimizer = make_optimizer("AdamW", model)
    tensors, state = optimizer_tensors(optimizer, names_of(model))
    assert tensors == {} and state["slots"] == {} and len(optimizer.state) == 0


def test_tensors_are_named_by_parameter():
    model = make_model()
    optimizer = make_optimizer("AdamW", model)
    steps(model, optimizer, scheduler_for(optimizer), 0, 2)
    tensors, state = optimizer_tensors(optimizer, names_of(model))
    keys = ("step", "exp_avg", "exp_avg_sq")
    assert tensors.keys() == {f"{i}.{kind}/{key}" for i in (0, 2) for kind in ("weight", "bias") for key in keys}
    assert [group["params"] for group in state["groups"]] == [["0.weight", "0.bias"], ["2.weight", "2.bias"]]
    json.dumps(state, allow_nan=False)


WRONG = {
    "missing tensor": (lambda t, s: t.pop("0.weight/exp_avg"), "were saved and are missing, first 0.weight/exp_avg"),
    "left over": (lambda t, s: t.update({"9.weight/exp_avg": torch.zeros(1)}), "were not saved, first 9.weight/exp_av"),
    "shape": (lambda t, s: t.update({"0.bias/exp_avg": torch.zeros(3)}), r"0.bias/exp_avg has shape \[3\], expected"),
    "scalar moment": (lambda t, s: t.update({"0.bias/exp_avg": torch.tensor(0.0)}), r"has shape \[\], expected \[8\]"),
    "class": (lambda t, s: s.update({"class": "SGD"}), "a SGD with 2 groups was saved, this is a AdamW"),
    "groups": (lambda t, s: s["groups"].pop(), "AdamW with 1 groups was saved"),
    "parameter": (lambda t, s: s["groups"][0].update(params=["0.weight", "other"]), "first other"),
    "option": (lambda t, s: s["groups"][0].pop("eps"), "options eps, which were not saved"),
    "foreign slot": (lambda t, s: s["slots"].update({"9.weight": {"step": {"value": 1}}}), "first 9.weight"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_load_optimizer_is_strict(wrong):
    model = make_model()
    optimizer = make_optimizer("AdamW", model)
    steps(model, optimizer, scheduler_for(optimizer), 0, 2)
    tensors, state = optimizer_tensors(optimizer, names_of(model))
    tensors, state = dict(tensors), json.loads(json.dumps(state))
    change, message = WRONG[wrong]
    change(tensors, state)
    fresh = make_optimizer("AdamW", model)
    rates = [group["lr"] for group in fresh.param_groups]
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(fresh, tensors, state, names_of(model))
    assert len(fresh.state) == 0 and [group["lr"] for group in fresh.param_groups] == rates


def test_names_have_to_fit():
    model = make_model()
    optimizer = make_optimizer("AdamW", model)
    some = names_of(model)
    some.pop(model[0].bias)
    with pytest.raises(ValueError, match=r"no name for a parameter of shape \[8\]"):
        optimizer_tensors(optimizer, some)
    with pytest.raises(ValueError, match="names two parameters"):
        optimizer_tensors(optimizer, dict.fromkeys(names_of(model), "same"))
