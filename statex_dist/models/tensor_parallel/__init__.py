"""Tensor parallelism: a rank's part of a model."""
