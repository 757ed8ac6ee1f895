"""The kernels of expanded layers on a machine without a GPU, under Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest

from tests.ops.gla.triton.interpreted import CASES
from tests.ops.interpreter import assert_script_passes


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_equal_the_recurrence():
    assert_script_passes("tests.ops.gla.triton.interpreted", CASES)
