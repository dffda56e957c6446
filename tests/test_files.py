"""Atomic files, lines that survive a kill, and one run per folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mllmcl import files
from mllmcl.files import (
    FolderLock,
    append_line,
    atomic_write,
    atomic_write_json,
    is_alive,
    read_jsonl,
    remove_leftovers,
    replace_folder,
    sha256_file,
)


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def dead() -> int:
    """The id of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def child():
    """Starts `python -c code` with a pipe from its stdout; killed at the end."""
    started = []

    def start(code: str) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


# -- whole files


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    atomic_write(path, "e\u0301\n")
    assert path.read_bytes() == "e\u0301\n".encode()
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["a.txt"]
    with pytest.raises(TypeError, match="bytes or str, got int"):
        atomic_write(path, 3)


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.txt"
    atomic_write(path, "old")

    def failing(*_arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, broken, failing)
    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(path, "new")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_atomic_write_syncs_before_and_after_the_rename(tmp_path, monkeypatch):
    events = []
    sync, replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append(re.sub(r"-\d+-\d+$", "", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("rename"), replace(old, new)))
    atomic_write(tmp_path / "a.txt", "x")
    assert events == [".tmp-a.txt", "rename", tmp_path.name]


def test_json(tmp_path):
    atomic_write_json(tmp_path / "a.json", {"a": [1, None, 0.5]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, None, 0.5]}
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "a.json", {"a": float("nan")})
    assert names(tmp_path) == ["a.json"]


def test_sha256(tmp_path):
    data = os.urandom((1 << 20) + 7)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()


def test_full_disk_names_the_file_and_keeps_the_old(tmp_path):
    path, lines = tmp_path / "a.txt", tmp_path / "events.jsonl"
    atomic_write(path, "old")
    append_line(lines, {"a": 1})
    length = lines.stat().st_size
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            for work, name in (
                (lambda: atomic_write(path, "x" * 9000), "a.txt"),
                (lambda: append_line(lines, {"a": "x" * 9000}), "events.jsonl"),
            ):
                try:
                    work()
                except OSError as error:
                    assert name in str(error)
                else:
                    raise AssertionError(name)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt", "events.jsonl"]
    assert lines.stat().st_size == length and read_jsonl(lines) == [{"a": 1}]


# -- folders


def test_replace_folder(tmp_path):
    path = tmp_path / "up" / "f"
    replace_folder(path, lambda folder: (folder / "one").write_text("1"))
    replace_folder(path, lambda folder: (folder / "two").write_text("2"))
    assert names(path) == ["two"] and names(path.parent) == ["f"]

    def failing(folder):
        (folder / "three").write_text("3")
        raise KeyError("no")

    with pytest.raises(KeyError):
        replace_folder(path, failing)
    assert names(path) == ["two"] and names(path.parent) == ["f"]


def test_replace_folder_puts_the_old_one_back(tmp_path, monkeypatch):
    path = tmp_path / "f"
    replace_folder(path, lambda folder: (folder / "one").write_text("1"))
    replace = os.replace

    def failing(old, new):
        if Path(new) == path and ".tmp-" in str(old):
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="Input/output"):
        replace_folder(path, lambda folder: (folder / "two").write_text("2"))
    assert names(tmp_path) == ["f"] and names(path) == ["one"]


def test_leftovers_of_the_dead(tmp_path, dead):
    kept = [".lock", "a.txt", ".tmp-a", f".tmp-a.txt-0-{os.getppid()}", f"tmp-x-{dead}"]
    for name in [*kept, f".tmp-a.txt-0-{dead}", f".tmp-b-3-{os.getpid()}"]:
        (tmp_path / name).write_text("")
    (tmp_path / f".trash-f-1-{dead}").mkdir()
    (tmp_path / f".trash-f-1-{dead}" / "file").write_text("")
    assert len(remove_leftovers(tmp_path)) == 3
    assert names(tmp_path) == sorted(kept)
    assert remove_leftovers(tmp_path / "missing") == []


# -- lines


def test_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    rows = [{"event": "step", "loss": 0.5}, {"text": "a\nb \u4e2d"}, {}]
    for row in rows:
        append_line(path, row)
    assert read_jsonl(path) == rows
    assert path.read_bytes().count(b"\n") == 3
    with pytest.raises(ValueError, match="JSON"):
        append_line(path, {"loss": float("inf")})
    with pytest.raises(TypeError, match="must be a dict, got list"):
        append_line(path, [1])
    assert read_jsonl(path) == rows


@pytest.mark.parametrize("size", [10, 5000, 20_000])
def test_torn_at_every_byte(tmp_path, size):
    """Whatever part of the last line was written: it is dropped, or whole, and the next line is not glued to it."""
    path = tmp_path / "events.jsonl"
    append_line(path, {"first": 1})
    start = path.stat().st_size
    append_line(path, {"text": "x" * size})
    whole = path.read_bytes()
    cuts = range(start, len(whole) + 1) if size < 100 else [start, start + 1, start + 4096, len(whole) - 1, len(whole)]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        expected = [{"first": 1}] + ([{"text": "x" * size}] if cut >= len(whole) - 1 else [])
        assert read_jsonl(path) == expected
        append_line(path, {"next": 2})
        assert read_jsonl(path) == [*expected, {"next": 2}]


def test_only_line_torn(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": ')
    assert read_jsonl(tmp_path / "a") == []
    append_line(tmp_path / "a", {"b": 1})
    assert (tmp_path / "a").read_bytes() == b'{"b": 1}\n'


def test_damage_inside_is_no_torn_line(tmp_path):
    (tmp_path / "a").write_bytes(b'{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        read_jsonl(tmp_path / "a")


def test_killed_while_appending(tmp_path, child):
    path = tmp_path / "events.jsonl"
    code = f"""
from mllmcl.files import append_line
for number in range(10**9):
    append_line({str(path)!r}, {{"number": number, "text": "x" * 3000}})
    print(number, flush=True)
"""
    process = child(code)
    for _ in range(50):
        confirmed = int(process.stdout.readline())
    process.kill()
    process.wait()
    numbers = [row["number"] for row in read_jsonl(path)]
    assert numbers == list(range(len(numbers))) and len(numbers) > confirmed
    append_line(path, {"number": len(numbers)})
    assert len(read_jsonl(path)) == len(numbers) + 1


# -- locks

HOLD = """
import sys, time
from mllmcl.files import FolderLock
with FolderLock({folder!r}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_second_process_is_refused(tmp_path, child):
    process = child(HOLD.format(folder=str(tmp_path / "run")))
    assert process.stdout.readline() == "held\n"
    message = rf"run: already in use by process {process.pid} on host {re.escape(socket.gethostname())}, since 20"
    with pytest.raises(RuntimeError, match=message):
        FolderLock(tmp_path / "run").acquire()
    # killed without a chance to clean up: the lock is taken over
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "run" / ".lock").exists()
    with FolderLock(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock").read_text())["pid"] == os.getpid()
    assert names(tmp_path / "run") == []


def test_zombie_counts_as_dead(tmp_path, child):
    process = child(HOLD.format(folder=str(tmp_path)))
    assert process.stdout.readline() == "held\n"
    process.kill()
    # not waited for: it stays in the process table
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(process.pid)
    FolderLock(tmp_path).acquire().release()


def test_same_process_twice_is_refused(tmp_path):
    with FolderLock(tmp_path), pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        FolderLock(tmp_path).acquire()
    assert names(tmp_path) == []


def test_one_of_many_takes_over(tmp_path, dead, child):
    """Many see the lock of a dead process at once; exactly one gets it."""
    mine = {"pid": dead, "host": socket.gethostname(), "start": "1", "time": "x"}
    atomic_write_json(tmp_path / ".lock", mine)
    code = f"""
import pathlib, sys, time
from mllmcl.files import FolderLock
print("ready", flush=True)
while not pathlib.Path({str(tmp_path / "go")!r}).exists():
    pass
try:
    FolderLock({str(tmp_path)!r}).acquire()
except RuntimeError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    time.sleep(60)
"""
    processes = [child(code) for _ in range(4)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    (tmp_path / "go").write_text("")
    assert sorted(process.stdout.readline() for process in processes) == ["held\n"] + ["refused\n"] * 3


@pytest.mark.parametrize(
    ("change", "is_refused"),
    [
        ({}, True),
        ({"start": "1"}, False),  # the id has gone to another process
        ({"pid": 2**22 + 5}, False),
        ({"host": "elsewhere", "pid": 2**22 + 5}, True),
    ],
)
def test_who_counts_as_alive(tmp_path, child, change, is_refused):
    process = child(HOLD.format(folder=str(tmp_path)))
    assert process.stdout.readline() == "held\n"
    holder = json.loads((tmp_path / ".lock").read_text())
    assert holder["start"] is not None
    atomic_write_json(tmp_path / ".lock", {**holder, **change})
    if is_refused:
        with pytest.raises(RuntimeError, match="already in use"):
            FolderLock(tmp_path).acquire()
    else:
        FolderLock(tmp_path).acquire().release()


def test_foreign_lock_file_is_refused(tmp_path):
    (tmp_path / ".lock").write_text("mine")
    with pytest.raises(RuntimeError, match="not a lock file of mllmcl"):
        FolderLock(tmp_path).acquire()


def test_forked_child_does_not_release(tmp_path):
    with FolderLock(tmp_path) as lock:
        pid = os.fork()
        if pid == 0:
            lock.release()
            os._exit(0)
        os.waitpid(pid, 0)
        assert (tmp_path / ".lock").exists()


def test_release_leaves_the_lock_of_another(tmp_path):
    lock = FolderLock(tmp_path).acquire()
    other = {"pid": 1, "host": "elsewhere", "start": "1", "time": "x"}
    atomic_write_json(tmp_path / ".lock", other)
    lock.release()
    assert json.loads((tmp_path / ".lock").read_text()) == other


def test_import_is_light():
    code = "import sys, mllmcl.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert files.__all__ == sorted(files.__all__)
