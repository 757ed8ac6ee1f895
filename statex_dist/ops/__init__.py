"""Operators: one folder per recurrence (PyTorch forms, kernels, dispatch), and what the recurrences share."""
