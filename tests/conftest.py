"""Every test has its own cache of generated data and its own working folder's worth of nothing to clean up."""

import os

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_session(tmp_path_factory):
    """Generated sets are written once a test run, and never into the user's cache."""
    before = os.environ.get("JEPA_FAST_CACHE")
    os.environ["JEPA_FAST_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield
    if before is None:
        del os.environ["JEPA_FAST_CACHE"]
    else:
        os.environ["JEPA_FAST_CACHE"] = before
