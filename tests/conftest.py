"""Fixtures that several test folders share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

# The networks of tests are too small for two threads to share, and beside other work two threads wait for each
# other: set before anything imports torch, and handed down to the commands that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of its own for each test, always seeded alike."""
    return np.random.default_rng(20240817)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of public measurements and data sets; the test skips where there is none."""
    folder = os.environ.get("FITNEST_DATA", "")
    if not Path(folder).is_dir() or not folder:
        pytest.skip("needs public measurements: set FITNEST_DATA to their folder")
    return Path(folder)
