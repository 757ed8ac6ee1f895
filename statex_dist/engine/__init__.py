"""Engines: what knows forward, backward, step, save and load (plain PyTorch, DeepSpeed ZeRO-3)."""
