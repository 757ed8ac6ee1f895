import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _no_classes_of_fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """The full flash-linear-attention registers its classes where it is imported: they come before code in an export.

    A test elsewhere may have imported it in this process.
    """
    if "transformers" in sys.modules:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", {})


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
