"""Measurements that need one NVIDIA GPU."""
