"""Files that survive a kill: atomic replacement, append-only JSON lines, hashes, one run per folder.

    atomic_write_json("run/matrix.json", {"rows": []})
    append_line("run/events.jsonl", {"event": "step", "loss": 0.5})
    with FolderLock("run"):
        ...

Everything temporary is named `.tmp-<name>-<pid>` or `.trash-<name>-<pid>`, so that what a killed process left behind
can be told from what a living one is writing (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

__all__ = [
    "FolderLock",
    "append_line",
    "atomic_write",
    "atomic_write_json",
    "fsync_file",
    "fsync_folder",
    "is_alive",
    "read_jsonl",
    "remove_leftovers",
    "replace_folder",
    "sha256_file",
    "temporary_path",
    "write_durably",
]

_LEFTOVER = re.compile(r"\.(?:tmp|trash)-.+-(\d+)")
_COUNTER = itertools.count()


def fsync_folder(folder: str | os.PathLike) -> None:
    """Make the names in `folder` (creations, renames, removals) durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: str | os.PathLike) -> None:
    """Make the content of a file that some library has written durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: str | os.PathLike, data: bytes | str) -> None:
    """Write a new file and sync it; OSError names the file, also where the disk is full."""
    try:
        with open(path, "xb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # a failed write, unlike a failed open, does not know its file
        raise OSError(error.errno, error.strerror, str(path)) from error


def temporary_path(path: str | os.PathLike) -> Path:
    """A name beside `path`, on the same file system, that no other call and no other process uses."""
    path = Path(path)
    return path.with_name(f".tmp-{path.name}-{next(_COUNTER)}-{os.getpid()}")


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that a reader finds the old file or the new one, never a part, at every moment.

    Temporary file, fsync, rename, fsync of the folder. If anything fails, OSError passes on, the old file stands and
    the temporary one is gone. Folders on the way are created.
    """
    if not isinstance(data, (bytes, str)):
        raise TypeError(f"atomic_write: data must be bytes or str, got {type(data).__name__}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_json(path: str | os.PathLike, value: object, *, indent: int | None = 2) -> None:
    """`atomic_write` of `value` as strict JSON (NaN and infinity raise ValueError: they are not JSON)."""
    atomic_write(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def replace_folder(path: str | os.PathLike, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a new temporary folder, make it durable and put it in the place of `path`.

    A folder cannot be renamed over a filled one, so an old `path` is moved aside first; a kill exactly between the two
    renames leaves no `path`, never a mixture. If `fill` raises, the old folder stands and nothing of the new one stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    trash = temporary.with_name(temporary.name.replace(".tmp-", ".trash-", 1))
    try:
        temporary.mkdir()
        fill(temporary)
        for file in sorted(temporary.rglob("*")):
            fsync_folder(file) if file.is_dir() else fsync_file(file)
        fsync_folder(temporary)
        if path.exists():
            os.replace(path, trash)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if trash.exists() and not path.exists():
            os.replace(trash, path)
        raise
    fsync_folder(path.parent)
    shutil.rmtree(trash, ignore_errors=True)


def sha256_file(path: str | os.PathLike) -> str:
    """The sha256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def append_line(path: str | os.PathLike, value: dict) -> None:
    """Append one JSON object as one line with a single write; a line that an earlier kill tore off is removed first.

    The line has reached the kernel when this returns, so it survives the death of the process. If only a part could be
    written (disk full), the part is cut off again and OSError names the file.
    """
    if not isinstance(value, dict):
        raise TypeError(f"append_line: value must be a dict, got {type(value).__name__}")
    line = json.dumps(value, allow_nan=False).encode("ascii") + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        end = _mend_end(descriptor)
        try:
            written = os.write(descriptor, line)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; nothing was appended", str(path)) from error
        if written != len(line):
            os.ftruncate(descriptor, end)
            raise OSError(
                errno.ENOSPC, f"only {written} of {len(line)} bytes could be appended; they were cut off", str(path)
            )
    finally:
        os.close(descriptor)


def _mend_end(descriptor: int) -> int:
    """Make the open file end with a newline (dropping a torn last line); return its length."""
    end = os.fstat(descriptor).st_size
    if end == 0 or os.pread(descriptor, 1, end - 1) == b"\n":
        return end
    start, tail = end, b""
    while start > 0 and b"\n" not in tail:
        step = min(4096, start)
        start -= step
        tail = os.pread(descriptor, step, start) + tail
    last = tail[tail.rfind(b"\n") + 1 :]
    if _parse(last) is None:
        os.ftruncate(descriptor, end - len(last))
        return end - len(last)
    return end + os.write(descriptor, b"\n")


def _parse(line: bytes) -> dict | None:
    """The object in `line`, or None: a torn object never parses, for its closing brace is missing."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The objects of a JSON-lines file; a torn last line (no newline, not an object) is dropped.

    Raises ValueError with the line number if any other line is not a JSON object.
    """
    rows = []
    *lines, last = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if (row := _parse(line)) is None:
            raise ValueError(f"{path}: line {number} is not a JSON object: {line[:80]!r}")
        rows.append(row)
    if (row := _parse(last)) is not None:
        rows.append(row)
    return rows


def is_alive(pid: int) -> bool:
    """Whether a process with this id exists on this machine (a zombie counts as dead)."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat_field(pid, 0) not in ("Z", "X")


def _stat_field(pid: int, index: int) -> str | None:
    """Field `index` after the process name of /proc/<pid>/stat; None where there is no such file."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # the name in parentheses may itself hold spaces and parentheses
    return text[text.rindex(")") + 2 :].split()[index]


def remove_leftovers(folder: str | os.PathLike) -> list[Path]:
    """Delete the `.tmp-*` and `.trash-*` of dead processes in `folder`; return what was deleted.

    Call it where this process is not writing into the folder: what bears this process's own id is taken as left by an
    earlier process that had the same id, as every process of a container has.
    """
    folder, removed = Path(folder), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or (int(match[1]) != os.getpid() and is_alive(int(match[1]))):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        removed.append(path)
    return removed


class FolderLock:
    """One living run per folder: `<folder>/.lock` names the holder by process id, host and start time.

    A second run is refused with RuntimeError that names the holder. The lock of a process that has died (or whose id
    now belongs to a process started later) is taken over. A holder on another host cannot be asked: it counts as alive.
    Use as a context manager, or `acquire` and `release`.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.path = self.folder / ".lock"
        self._held: dict | None = None

    def acquire(self) -> FolderLock:
        """Take the lock or raise RuntimeError; the folder is created. Returns itself."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._guard():
            holder = self._holder()
            if holder is not None and self._is_live(holder):
                raise RuntimeError(
                    f"{self.folder}: already in use by process {holder['pid']} on host {holder['host']}, since "
                    f"{holder['time']}. Wait for it, stop it, choose another folder, or, if you are sure that it is "
                    f"dead, delete {self.path}"
                )
            mine = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "start": _stat_field(os.getpid(), 19),
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            atomic_write_json(self.path, mine, indent=None)
            self._held = mine
        return self

    def release(self) -> None:
        """Give the lock back; does nothing in a forked child or if the lock is not held."""
        if self._held is None or self._held["pid"] != os.getpid():
            return
        with self._guard():
            if self._holder() == self._held:
                self.path.unlink()
        self._held = None

    def __enter__(self) -> FolderLock:
        return self if self._held else self.acquire()

    def __exit__(self, *_exception) -> None:
        self.release()

    @contextlib.contextmanager
    def _guard(self):
        """Make looking at the lock and replacing it one step: two runs must not both take over a dead one's lock."""
        # the folder itself is locked for a moment: no second file that somebody would have to clean up
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _holder(self) -> dict | None:
        try:
            holder = _parse(self.path.read_bytes())
        except FileNotFoundError:
            return None
        if holder is None or not {"pid", "host", "start", "time"} <= holder.keys():
            raise RuntimeError(f"{self.path}: is not a lock file of mllmcl; look at it and delete it")
        return holder

    @staticmethod
    def _is_live(holder: dict) -> bool:
        if holder["host"] != socket.gethostname():
            return True
        if not is_alive(holder["pid"]):
            return False
        return holder["start"] == _stat_field(holder["pid"], 19)
