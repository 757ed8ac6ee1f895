"""The GPU dispatch to fla-core on a machine without a GPU: the real kernels under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from statex_dist.ops.fla_api import has_fla
from tests.ops.interpreted_kernels import CASES


@pytest.mark.skipif(not has_fla(), reason="fla-core or triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/ops/test_gpu_kernels.py runs the compiled kernels")
def test_fla_kernels_equal_the_recurrence():
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreted_kernels"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split("\n")[:-1] == [f"ok {case}" for case in CASES]
