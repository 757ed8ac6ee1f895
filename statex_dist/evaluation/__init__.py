"""Measuring what a model recalls and how well it predicts text."""
