"""Optimizer: parameter groups by name, learning-rate schedules."""
