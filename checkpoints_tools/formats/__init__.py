"""Layouts that are written, one module or folder each."""
