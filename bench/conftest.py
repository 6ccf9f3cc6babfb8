"""Benchmarks run one after another in one process, where pytest-xdist is on by default."""

from __future__ import annotations

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    return 0
