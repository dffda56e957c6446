"""Shared settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

# processes that share the tests share two cores
JOBS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(int(os.environ.get("MLLMCL_TEST_THREADS", max(1, 2 // JOBS))))
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, alone or after others."""
    torch.manual_seed(0)
