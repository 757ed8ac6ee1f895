"""One thread per process: tiny tensors gain nothing from more, and OpenMP spinning on a busy machine costs tenfold."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import torch

from statex_dist.ops.mamba_api import enter_mamba_ssm, has_mamba_ssm

if torch.cuda.is_available() and has_mamba_ssm():
    enter_mamba_ssm()  # transformers' Mamba2, an oracle, takes our build of the package for a compiled one
