"""Marks of tests."""

from typing import Any

import pytest


def slow(*values: object) -> Any:
    """Parameters that only the slow tests take."""
    return pytest.param(*values, marks=pytest.mark.slow)
