"""Shared settings of all tests."""

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("MLLMCL_TEST_THREADS", "2")))
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def seeded():
    """Each test draws the same numbers, alone or after others."""
    torch.manual_seed(0)
