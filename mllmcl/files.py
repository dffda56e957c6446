"""Files that are either whole or as they were: atomic writes, append-only logs, locks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "FolderLock",
    "append_line",
    "atomic_write",
    "atomic_write_json",
    "fsync_folder",
    "read_jsonl",
    "sha256_file",
    "temporary_folder_beside",
]


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | os.PathLike, data: bytes | str) -> None:
    """Replace `path` by `data`: a temporary file beside it, fsync, rename, fsync of the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def atomic_write_json(path: str | os.PathLike, value: object) -> None:
    """The same for a JSON value; NaN and infinity are refused."""
    atomic_write(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def append_line(path: str | os.PathLike, value: dict) -> None:
    """Append one JSON line in a single write; a torn last line of an earlier process is cut off first."""
    path = Path(path)
    line = (json.dumps(value, allow_nan=False) + "\n").encode()
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            whole = path.read_bytes().rfind(b"\n") + 1
            os.ftruncate(handle, whole)
        os.write(handle, line)
    finally:
        os.close(handle)


def read_jsonl(path: str | os.PathLike) -> list[dict]:
    """The lines of a JSON-lines file; a torn last line is dropped.

    Raises:
        ValueError: another line than the last is no JSON.
    """
    lines = Path(path).read_text().split("\n")
    values = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is no JSON ({error})") from error
    return values


def sha256_file(path: str | os.PathLike) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None where there is none or the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None


def _alive(holder: dict) -> bool:
    if holder["host"] != socket.gethostname():
        # nothing can be known about a process of another machine
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("started") is None or holder["started"] == _started(holder["pid"])


class FolderLock:
    """Only one live process works in a folder; the lock of a dead one is taken over.

    >>> with FolderLock(folder):
    ...     ...
    """

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / ".lock"

    def __enter__(self) -> FolderLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid()), "since": time.time()}
        for _ in range(10):
            try:
                handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                self._clear_dead()
                continue
            with os.fdopen(handle, "w") as file:
                json.dump(me, file)
            return self
        raise RuntimeError(f"{self.path}: could not be taken, another process keeps taking it")

    def _clear_dead(self) -> None:
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return
        try:
            holder = json.loads(text)
        except json.JSONDecodeError:
            # a process that died between creating and writing, unless it is still at it
            if time.time() - self.path.stat().st_mtime < 2.0:
                time.sleep(0.2)
                return
            holder = None
        if holder is not None and _alive(holder):
            raise RuntimeError(
                f"{self.path.parent} is in use by process {holder['pid']} on {holder['host']}; wait for it, "
                f"choose another folder, or delete {self.path} if that process is gone"
            )
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    def __exit__(self, *_exc) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


@contextlib.contextmanager
def temporary_folder_beside(path: Path) -> Iterator[Path]:
    """A fresh folder beside `path`, removed again unless it was renamed meanwhile."""
    import shutil

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".tmp-{path.name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
