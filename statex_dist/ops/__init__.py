"""Operators: one folder per recurrence (PyTorch forms, kernels, dispatch) beside the modules that they share."""
