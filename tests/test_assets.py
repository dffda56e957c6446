"""Assets: fetched once, checked by sha256, damaged ones refused, several processes at once."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllmcl import assets
from mllmcl.assets import ASSETS, WHEELS, Asset, AssetError, Wheel, asset, cache_dir

CONTENT = {"toy/one.bin": b"first", "toy/two.bin": b"second", "toy/model/a.txt": b"a", "toy/model/deep/b.txt": b"b"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(path, content=CONTENT):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLMCL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toy(home, tmp_path, monkeypatch):
    """A made-up wheel with two files and a folder; its place among the wheels laid by hand. Downloads are refused."""
    path = write_wheel(tmp_path / "toy.whl")
    wheel = Wheel(package="toy-data", version="1.0", tag="py3-none-any", sha256=sha256(path.read_bytes()))
    listing = "".join(f"{sha256(CONTENT[f'toy/model/{name}'])}  {name}\n" for name in ("a.txt", "deep/b.txt"))
    known = {
        "one": Asset(wheel=wheel, member="toy/one.bin", sha256=sha256(b"first"), licence="MIT"),
        "two": Asset(wheel=wheel, member="toy/two.bin", sha256=sha256(b"second"), licence="MIT"),
        "model": Asset(wheel=wheel, member="toy/model/", sha256=sha256(listing.encode()), licence="MIT"),
    }
    monkeypatch.setattr(assets, "ASSETS", known)

    def refuse(wheel, *_):
        raise AssertionError(f"{wheel.package} would be downloaded")

    monkeypatch.setattr(assets, "_download", refuse)
    return path.rename(cache_dir("wheels") / wheel.file)


def test_the_table_is_whole():
    for name, known in ASSETS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9a-f]{64}", known.sha256), name
        assert known.wheel is WHEELS[known.wheel.package]
    for wheel in WHEELS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256), wheel
        assert any(known.wheel is wheel for known in ASSETS.values()), wheel
    assert {"smollm2-135m-instruct", "efficientnet-lite0", "minilm-l6"} <= ASSETS.keys()


def test_unknown_name_lists_the_known_ones(home):
    with pytest.raises(ValueError, match=r"asset must be one of .*efficientnet-lite0.*, got 'efficientnet'"):
        asset("efficientnet")


def test_cache_dir_follows_the_variable(home, monkeypatch, tmp_path):
    assert cache_dir("a", "b") == home / "a" / "b" and (home / "a" / "b").is_dir()
    monkeypatch.delenv("MLLMCL_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mllmcl"


def test_wheel_laid_by_hand_gives_all_its_assets_at_once(toy):
    assert asset("one").read_bytes() == b"first"
    toy.unlink()
    assert asset("two").read_bytes() == b"second"
    folder = asset("model")
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"a.txt": b"a", "deep/b.txt": b"b"}
    assert asset("model") == folder


@pytest.mark.parametrize("name, part", [("one", "."), ("model", "deep/b.txt")])
def test_damaged_cache_is_told_and_fetched_anew(toy, caplog, name, part):
    path = asset(name) / part if part != "." else asset(name)
    good = path.read_bytes()
    path.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        asset(name)
    assert path.read_bytes() == good
    assert f"asset {name}" in caplog.text and "fetching it anew" in caplog.text


def test_touched_but_right_cache_is_kept(toy):
    path = asset("one")
    os.utime(path, (1, 1))
    toy.unlink()
    assert asset("one") == path


def test_second_call_does_not_hash(toy, monkeypatch):
    path = asset("one")

    def refuse(path):
        raise AssertionError(f"{path} is hashed")

    monkeypatch.setattr(assets, "sha256_file", refuse)
    assert asset("one") == path
    os.utime(path, (1, 1))
    with pytest.raises(AssertionError, match=r"one\.bin is hashed"):
        asset("one")


def test_damaged_mark_is_made_anew(toy):
    path = asset("one")
    mark = path.with_name(".one.bin.sha256")
    good = mark.read_bytes()
    mark.write_bytes(b"\xff\xfe")
    assert asset("one") == path and mark.read_bytes() == good


def test_cut_wheel_is_refused(toy):
    toy.write_bytes(toy.read_bytes()[:-30])
    with pytest.raises(AssetError, match=r"toy_data-1\.0-py3-none-any\.whl has sha256 .*; it was not used"):
        asset("one")
    assert not (cache_dir("assets", "one") / "one.bin").exists()


def test_wheel_of_another_platform_is_judged_by_its_member(toy):
    other = toy.rename(toy.with_name("toy_data-1.0-cp314-none-win_amd64.whl"))
    assert asset("one").read_bytes() == b"first"
    write_wheel(other, {**CONTENT, "toy/two.bin": b"other"})
    (cache_dir("assets", "two") / "two.bin").unlink()
    with pytest.raises(AssetError, match=r"asset two: toy/two\.bin in .* has sha256 .*, expected .*; it was not used"):
        asset("two")
    assert not (cache_dir("assets", "two") / "two.bin").exists()
    other.write_bytes(b"no zip")
    with pytest.raises(AssetError, match=r"holds no readable toy/two\.bin"):
        asset("two")


def test_leftovers_of_killed_downloads_go(toy, home):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = home / f".tmp-download-0-{process.pid}"
    left.mkdir()
    (left / "half.whl").write_bytes(b"half")
    asset("one")
    assert not left.exists()
    assert not [path for path in home.iterdir() if path.name.startswith(".tmp-")]


def test_threads_fetch_once(toy, monkeypatch):
    taken = []
    real = assets._take
    monkeypatch.setattr(assets, "_take", lambda wheel, name: (taken.append(name), real(wheel, name)))
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: asset("one"), range(32)))) == 1
    assert sorted(taken) == ["model", "one", "two"]


def test_no_index_says_what_to_do(home, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(AssetError) as caught:
        asset("seattle-weather")
    text = str(caught.value)
    assert "vega-datasets==0.9.0 could not be fetched" in text and "No matching distribution" in text
    assert "vega_datasets-0.9.0-py3-none-any.whl" in text and str(home / "wheels") in text


@pytest.mark.network
def test_two_processes_at_once(home):
    code = "from mllmcl.assets import asset; print(asset('seattle-weather').read_text()[:4])"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in running] == ["date\n"] * 3
    names = sorted(path.name for path in (home / "assets" / "seattle-weather").iterdir())
    assert names == [".seattle-weather.csv.sha256", "seattle-weather.csv"]


@pytest.mark.network
def test_wheel_of_one_platform_serves_all(home, monkeypatch):
    commands = []
    real = subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (commands.append(command), real(command, **options))[1]
    )
    assert sha256(asset("nuclei-mask").read_bytes()) == ASSETS["nuclei-mask"].sha256
    (command,) = commands
    assert {"--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--no-deps"} <= set(command)
