"""Mamba2 (arXiv 2405.21060), with the parameter names of transformers' ``Mamba2ForCausalLM``."""
