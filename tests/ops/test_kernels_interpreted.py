"""The GPU dispatch to fla-core on a machine without a GPU: the real kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from statex_dist.ops.fla_api import has_fla
from tests.ops.interpreted_kernels import CASES
from tests.ops.interpreter import assert_script_passes


@pytest.mark.skipif(not has_fla(), reason="fla-core or triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops/test_gpu_kernels.py runs the compiled kernels")
@pytest.mark.slow
def test_fla_kernels_equal_the_recurrence():
    assert_script_passes("tests.ops.interpreted_kernels", CASES)
