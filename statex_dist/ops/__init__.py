"""Scans: naive recurrences (the oracle), chunked PyTorch (CPU, any gate) and dispatch to the GPU kernels."""
