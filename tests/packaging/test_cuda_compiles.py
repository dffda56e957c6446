"""The CUDA sources compile for sm_80 and sm_90 without spills, and their tables cover every number once."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mllmcl_kernels import Mask
from mllmcl_kernels.cuda_launch import CHUNK
from mllmcl_kernels.device_tables import chunk_starts, table_rows
from mllmcl_kernels.library import FOLDER
from mllmcl_kernels.masks import flatten_masks

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_compiles_without_spills(source: Path, tmp_path):
    home = Path(torch.__file__).parent / "include"
    flags = ["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "--expt-relaxed-constexpr"]
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in (80, 90)]
    include = [f"-I{home}", f"-I{home / 'torch/csrc/api/include'}"]
    command = ["nvcc", *flags, *archs, *include, "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "out.o")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr.lower(), done.stderr
    # a stack frame is an array that left the registers
    spills = [int(count) for count in re.findall(r"(\d+) bytes (?:spill|stack)", done.stderr)]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", done.stderr)]
    assert registers and max(registers) <= 128
    assert spills and not any(spills)


@pytest.mark.skipif(not (FOLDER / "libmllmcl_cuda.so").exists(), reason="the CUDA library was not built")
def test_the_library_needs_libtorch():
    """By whose way it finds libtorch_cuda, and there the current stream."""
    assert b"\0libtorch.so\0" in (FOLDER / "libmllmcl_cuda.so").read_bytes()


@pytest.mark.parametrize("sizes", [(), (0,), (1,), (CHUNK,), (CHUNK + 1, 0, 3 * CHUNK - 7, 5)], ids=str)
def test_chunks_cover_every_number_once(sizes):
    seen = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for tensor, start in chunk_starts(sizes, CHUNK).tolist():
        seen[tensor][start : start + CHUNK] += 1
    assert all(bool((counts == 1).all()) for counts in seen)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_an_entry_finds_the_row_of_every_number(dim):
    """The kernel's index arithmetic, in Python, against the mask as torch broadcasts it."""
    tensor = torch.zeros(3, 4, 5)
    mask = Mask.rows(torch.rand(tensor.shape[dim]) < 0.5, dim)
    masks = flatten_masks("test", [tensor], [mask])
    ((*_, inner, rows, numel),) = table_rows([[tensor]], *masks)
    ((flat,), *_) = masks
    kept = torch.tensor([bool(flat[at // inner % rows]) for at in range(numel)]).view(tensor.shape)
    assert torch.equal(kept, mask.expand(tensor.shape).expand(tensor.shape))
