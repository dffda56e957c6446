"""Tuning: who wins, what is kept in the file, when defaults run. The clock is invented, the files are real."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

from mllmcl_kernels import info, tune, tuning

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Tile:
    m: int
    warps: int


TILES = (Tile(16, 4), Tile(32, 4), Tile(64, 8))
KEY = ("kernel", 128, 64, torch.float16)
TEXT = "kernel 128 64 float16"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLMCL_TUNING_FOLDER", str(tmp_path / "tuning"))
    monkeypatch.delenv("MLLMCL_TUNING", raising=False)
    tuning.forget()
    yield tmp_path / "tuning"
    tuning.forget()


def pick(key=KEY, tiles=TILES, run=lambda tile: None):
    return tuning.pick_tile(key, tiles, CPU, run)


def tune_to(best: Tile, *keys: tuple) -> tuning.Winners:
    """Tune `keys` with a clock by which `best` is the quickest."""
    last = []

    def seconds(run):
        run()
        return 1.0 if last[-1] == best else 2.0

    return tune(lambda: [pick(key, run=last.append) for key in keys], timer=seconds)


def written(folder) -> dict:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_without_a_table_the_first_candidate_runs_and_nothing_is_launched_or_written(folder):
    launched = []
    assert pick(run=launched.append) == TILES[0]
    assert not launched and not folder.exists()


def test_every_candidate_is_timed_once_and_the_quickest_is_kept(folder):
    launched = []

    def seconds(run):
        run()
        return [3.0, 1.0, 2.0][len(launched) - 1]

    def run():
        return [pick(run=launched.append) for _ in range(2)]

    assert tune(run, timer=seconds) == {TEXT: (32, 4)}
    assert launched == list(TILES)
    assert written(folder) == {"format": 1, "winners": {TEXT: [32, 4]}}
    assert pick(run=launched.append) == TILES[1] and len(launched) == 3
    assert pick(("kernel", 256, 64, torch.float16)) == TILES[0]


def test_the_winner_is_that_of_the_file_in_another_process(folder):
    tune_to(TILES[2], KEY)
    tuning.forget()
    assert pick() == TILES[2]


def test_tuning_again_times_again(folder):
    tune_to(TILES[2], KEY)
    assert tune_to(TILES[1], KEY) == {TEXT: (32, 4)}
    assert pick() == TILES[1] and written(folder)["winners"] == {TEXT: [32, 4]}


def test_a_winner_that_is_no_longer_a_candidate_is_passed_over(folder):
    tune_to(TILES[2], KEY)
    tuning.forget()
    assert pick(tiles=TILES[:2]) == TILES[0]


def test_a_single_candidate_is_not_timed(folder):
    assert tune(lambda: pick(tiles=TILES[:1]), timer=lambda run: pytest.fail("timed")) == {}
    assert not folder.exists()


def test_tokens_share_a_winner_between_powers_of_two():
    assert [tuning.bucket(tokens) for tokens in (0, 1, 2, 3, 128, 129)] == [1, 1, 2, 4, 128, 256]


def test_switched_off_nothing_is_read_and_nothing_is_timed(folder, monkeypatch):
    tune_to(TILES[2], KEY)
    tuning.forget()
    monkeypatch.setenv("MLLMCL_TUNING", "0")
    monkeypatch.setattr(tuning, "read_table", lambda path: pytest.fail("read"))
    assert pick() == TILES[0]
    with pytest.raises(RuntimeError, match="MLLMCL_TUNING=0 is set"):
        tune_to(TILES[1], KEY)


def test_the_folder_is_the_users_cache_unless_it_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MLLMCL_TUNING_FOLDER")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning.table_path(CPU).parent == tmp_path / "cache" / "mllmcl_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning.table_path(CPU).parent == tmp_path / "home" / ".cache" / "mllmcl_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert tuning.table_path(CPU) is None and pick() == TILES[0]


def test_winners_of_tensors_side_by_side_are_theirs_alone(monkeypatch):
    """W and B apart, side by side with x copied, and with x in place: three keys, and each keeps its own way."""
    triton_expand = pytest.importorskip("mllmcl_kernels.triton_expand")
    from mllmcl_kernels import rows_with_room, side_by_side

    x, weight, mixed, lora_b = (torch.randn(size).half() for size in ((512, 24), (20, 24), (512, 5), (20, 5)))
    placed, beside = rows_with_room((512, 24), 5, dtype=torch.float16).copy_(x), side_by_side(weight, lora_b)
    # a clock by which the last candidate is the quickest
    ticks, used, run = iter(range(1000, 0, -1)), [], triton_expand._run
    monkeypatch.setattr(triton_expand, "_run", lambda way, *rest: (used.append(str(way)), run(way, *rest))[1])

    def last_used(rows, weight, lora_b):
        result = triton_expand.add_product(rows, weight, None, mixed, lora_b)
        torch.testing.assert_close(result, x @ weight.t() + mixed @ lora_b.t(), rtol=1e-2, atol=1e-2)
        return used[-1]

    for rows in (x, placed):
        assert last_used(rows, *beside) == "two products"
        tune(lambda rows=rows: last_used(rows, *beside), timer=lambda call: (call(), next(ticks))[1])
        assert last_used(rows, *beside) == "one product"
        assert last_used(rows, weight, lora_b) == "two products"


def test_while_a_graph_is_captured_no_file_is_read_and_nothing_is_timed(folder, monkeypatch):
    """What is known already is used, and what is not is looked up after the capture."""
    other = ("other", *KEY[1:])
    tune_to(TILES[2], KEY, other)
    tuning.forget()
    reads = []
    read_table = tuning.read_table
    monkeypatch.setattr(tuning, "read_table", lambda path: (reads.append(path), read_table(path))[1])
    with monkeypatch.context() as capture:
        capture.setattr(tuning, "is_capturing", lambda device: True)
        assert pick() == TILES[0] and not reads
        with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
            tune_to(TILES[1], KEY)
    assert pick() == TILES[2] and len(reads) == 1
    monkeypatch.setattr(tuning, "is_capturing", lambda device: True)
    assert pick(other) == TILES[2] and len(reads) == 1


def test_a_capture_within_tune_is_not_timed(folder, monkeypatch):
    def run():
        monkeypatch.setattr(tuning, "is_capturing", lambda device: True)
        assert pick() == TILES[0]

    assert tune(run, timer=lambda run: pytest.fail("timed")) == {}


def test_deterministic_algorithms_keep_to_the_first_candidate(folder):
    tune_to(TILES[2], KEY)
    torch.use_deterministic_algorithms(True)
    try:
        assert pick() == TILES[0]
        with pytest.raises(RuntimeError, match="deterministic"):
            tune_to(TILES[1], KEY)
    finally:
        torch.use_deterministic_algorithms(False)
    assert pick() == TILES[2]


def test_the_real_clock_needs_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        tune(lambda: pytest.fail("ran"))


CORRUPT = {
    "cut off": ('{"format": 1, "winners": {"ker', "Unterminated string"),
    "not text": (b"\xff\xfe\x00", "decode"),
    "another format": ('{"format": 2, "winners": {}}', "expected format 1"),
    "a list": ("[]", "expected format 1"),
    "no winners": ('{"format": 1}', "it has no winners"),
    "a float": ('{"format": 1, "winners": {"kernel": [16.0, 4]}}', r"expected integers for 'kernel', got \[16.0, 4\]"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_table_is_told_once_passed_over_and_never_overwritten(folder, caplog, kind):
    content, reason = CORRUPT[kind]
    data = content if isinstance(content, bytes) else content.encode()
    path = tuning.table_path(CPU)
    path.parent.mkdir()
    path.write_bytes(data)
    with caplog.at_level("WARNING", "mllmcl_kernels"):
        assert [pick(), pick(), pick(("other",))] == [TILES[0]] * 3
    (record,) = caplog.records
    assert str(path) in record.message and "or set MLLMCL_TUNING=0" in record.message
    with pytest.raises(ValueError, match=reason):
        tune(lambda: pytest.fail("ran"), timer=lambda run: 0.0)
    assert path.read_bytes() == data
    assert "is not a tuning table" in info.report()


def test_info_says_what_is_tuned(folder):
    assert "defaults run" in info.report()
    tune_to(TILES[2], KEY)
    assert f"1 winners in {tuning.table_path(CPU)}" in info.report()


def test_a_failed_write_leaves_the_old_table(folder, monkeypatch):
    tune_to(TILES[2], KEY)
    monkeypatch.setattr(tuning.os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        tune_to(TILES[1], KEY)
    assert written(folder)["winners"] == {TEXT: [64, 8]}


def test_a_writer_waits_for_the_one_before(folder, monkeypatch):
    """One that comes between another's reading and writing adds to what that one writes."""
    path = tuning.table_path(CPU)
    read_table = tuning.read_table
    second = threading.Thread(target=tuning._add_to_table, args=(path, {"second": (2, 4)}))

    def interrupted(path):
        found = read_table(path)
        if second.ident is None:
            second.start()
            # long enough to write, had it not to wait
            second.join(0.5)
        return found

    monkeypatch.setattr(tuning, "read_table", interrupted)
    tuning._add_to_table(path, {"first": (1, 4)})
    second.join()
    assert read_table(path) == {"first": (1, 4), "second": (2, 4)}


WRITER = """
import sys
from mllmcl_kernels import tuning
import torch
path = tuning.table_path(torch.device("cpu"))
print("ready", flush=True)
sys.stdin.readline()
for number in range(25):
    tuning._add_to_table(path, {f"kernel {sys.argv[1]} {number}": (number, 4)})
"""


def test_processes_that_write_at_once_lose_nothing(folder):
    """Two writers, and a reader that finds a whole table at every moment."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, name], **pipes) for name in "ab"]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    sizes = [0]
    path = tuning.table_path(CPU)
    while any(writer.poll() is None for writer in writers):
        sizes.append(len(tuning.read_table(path)))
    assert [writer.wait() for writer in writers] == [0, 0]
    for writer in writers:
        writer.communicate()
    assert sizes == sorted(sizes)
    expected = {f"kernel {name} {number}": (number, 4) for name in "ab" for number in range(25)}
    assert tuning.read_table(path) == expected
    assert {file.suffix for file in folder.iterdir()} == {".json", ".lock"}
