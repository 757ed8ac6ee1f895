"""Torch distributed checkpoints (DCP, Megatron's torch_dist), read without torch."""
