"""DeepSpeed ZeRO stage 3 checkpoints, read without deepspeed or torch."""
