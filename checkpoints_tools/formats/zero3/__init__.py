"""DeepSpeed ZeRO stage 3 checkpoints, written."""
