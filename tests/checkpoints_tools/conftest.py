import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def deepspeed_run(tmp_path_factory) -> Path:
    """A directory with real two-rank ZeRO-3 checkpoints: ``fp32/`` and ``bf16/``."""
    directory = tmp_path_factory.mktemp("zero3")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("train_zero3.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(directory)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory
