"""Bamba (Hugging Face): Mamba2 layers beside softmax attention. Expanded here; transformers runs it."""
