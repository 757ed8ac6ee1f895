"""Recurrent decoding: prompts of any length, one step a token, prompt caches, and the server's batches."""
