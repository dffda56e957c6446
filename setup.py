"""Builds what can be built here: the C++ library, the CUDA library, and the small `_C` module of build facts.

    MLLMCL_CUDA=1  a missing nvcc is an error     MLLMCL_CUDA=0  no CUDA library
    TORCH_CUDA_ARCH_LIST="8.0;9.0"                MLLMCL_SANITIZE=1  address and undefined-behaviour sanitizers

Without torch or a compiler the package installs as pure Python and says so.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
ABI_TARGET = "0x020a000000000000"  # LibTorch Stable ABI of 2.10
SANITIZE = ["-fsanitize=address,undefined", "-g", "-O1", "-DMLLMCL_BASELINE"]


def cuda_wanted() -> bool:
    choice = os.environ.get("MLLMCL_CUDA", "")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(os.environ.get("CUDA_HOME", ""), "bin"))
    if choice == "1" and not nvcc:
        sys.exit("MLLMCL_CUDA=1, but no nvcc on PATH or in CUDA_HOME/bin")
    return choice != "0" and bool(nvcc) and any((ROOT / "csrc/cuda").glob("*.cu"))


class Build(build_ext):
    """Each library is a list of single-file compilations and one link; a failure leaves that library out."""

    def run(self) -> None:
        facts = {}
        for label, build in (("cpp", self.cpu), ("cuda", self.cuda), ("_C", self.binding)):
            try:
                facts[label] = build() or "built"
            except Exception as error:
                if label == "cuda" and os.environ.get("MLLMCL_CUDA") == "1":
                    raise
                facts[label] = f"not built: {error}"
                sys.stderr.write(
                    f"mllmcl: {label} was not built ({error}); it installs without, `mllmcl doctor` tells more\n"
                )
        folder = self.target()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "build.json").write_text(json.dumps(facts, indent=1) + "\n")

    def target(self) -> Path:
        return ROOT / "mllmcl_kernels" if self.inplace else Path(self.build_lib) / "mllmcl_kernels"

    def binding(self) -> str:
        super().run()
        # setuptools passes over an optional extension that fails with no more than a warning
        missing = [
            path for path in map(self.get_ext_fullpath, (e.name for e in self.extensions)) if not Path(path).exists()
        ]
        return "not built: the compiler failed on csrc/binding.cpp" if missing else "built"

    def torch_flags(self) -> tuple[list[str], list[str]]:
        import torch

        home = Path(torch.__file__).parent
        include = [f"-I{home / 'include'}", f"-I{home / 'include/torch/csrc/api/include'}"]
        link = [f"-L{home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
        return [*include, f"-DTORCH_TARGET_VERSION={ABI_TARGET}", "-std=c++20"], link

    def library(self, name: str, sources: list[Path], compiler: list[str], link: list[str]) -> str:
        folder = Path(self.build_temp) / name
        folder.mkdir(parents=True, exist_ok=True)
        objects = [folder / f"{source.stem}.o" for source in sources]
        commands = [[*compiler, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        self.target().mkdir(parents=True, exist_ok=True)
        final = self.target() / f"lib{name}.so"
        partial = final.with_suffix(f".so.{os.getpid()}")
        subprocess.run([compiler[0], "-shared", *map(str, objects), "-o", str(partial), *link], check=True)
        os.replace(partial, final)
        return f"built from {len(sources)} files"

    def cpu(self) -> str:
        flags, link = self.torch_flags()
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "c++"
        strict = os.environ.get("MLLMCL_SANITIZE", "0") == "1"
        optimise = SANITIZE if strict else ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        link = [*link, *(SANITIZE[:1] if strict else [])]
        return self.library("mllmcl_cpu", sources, [compiler, "-fPIC", "-Wall", *optimise, *flags], link)

    def cuda(self) -> str:
        if not cuda_wanted():
            return "not built: no nvcc, no sources, or MLLMCL_CUDA=0"
        flags, link = self.torch_flags()
        names = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace(" ", ";").split(";")
        archs = [name.replace(".", "").removesuffix("+PTX") for name in names if name]
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        compiler = [shutil.which("nvcc") or "nvcc", "-O3", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr", *gencode]
        sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
        # the current stream is asked of libtorch_cuda, which a torch without CUDA has not; libtorch leads there where
        # it is, but defines nothing itself, so that linkers leave it out unless told
        link = ["-Xlinker", "--no-as-needed", *link, "-cudart=shared"]
        self.library("mllmcl_cuda", sources, [*compiler, "-DUSE_CUDA", *flags], link)
        return f"built for {', '.join(archs)}"


def extensions() -> list:
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        # an extension that is never compiled: the command has to run all the same
        return [Extension("mllmcl_kernels._C", ["csrc/binding.cpp"], optional=True)]
    macros = [("MLLMCL_ABI_TARGET", f'"{ABI_TARGET}"')]
    return [Pybind11Extension("mllmcl_kernels._C", ["csrc/binding.cpp"], define_macros=macros, optional=True)]


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})
