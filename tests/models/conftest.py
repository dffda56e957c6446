from __future__ import annotations

import pytest

from mllmcl.models import MLLM

from .tiny import make_composed, make_samples, save_llava, save_qwen


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_llava(root / "llava")
    save_qwen(root / "qwen2_5_vl")
    return root


@pytest.fixture(params=["llava", "qwen2_5_vl", "composed"])
def family(request):
    return request.param


@pytest.fixture
def build(folders):
    """Name of a family to a fresh tiny model."""

    def make(name: str) -> MLLM:
        return make_composed() if name == "composed" else MLLM.from_pretrained(folders / name)

    return make


@pytest.fixture
def mllm(build, family):
    return build(family)


@pytest.fixture
def samples(family):
    return make_samples(family)
