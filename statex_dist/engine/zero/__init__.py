"""DeepSpeed ZeRO: the process group, the engine and its checkpoint files. Only this folder imports deepspeed."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before deepspeed is imported
