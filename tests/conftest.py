"""Shared settings of all tests."""

import os

import torch
from hypothesis import settings

torch.set_num_threads(int(os.environ.get("MLLMCL_TEST_THREADS", "2")))
settings.register_profile("default", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("default")
