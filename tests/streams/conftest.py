"""The built-in streams, built from nothing in a cache of this test run; packages are fetched once for all."""

from __future__ import annotations

import pytest

from mllmcl import assets, streams


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A cache with the assets of the user's one and no streams."""
    folder = tmp_path_factory.mktemp("home")
    for part in ("assets", "wheels", "tarballs"):
        (folder / part).symlink_to(assets.cache_dir(part))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLLMCL_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def domain(home):
    return streams.load("pocket-domain")


@pytest.fixture(scope="session")
def ability(home):
    return streams.load("pocket-ability")


@pytest.fixture(scope="session")
def domain_signs(home):
    return streams.load("pocket-domain-signs")


@pytest.fixture(scope="session")
def ability_hard(home):
    return streams.load("pocket-ability-hard")
