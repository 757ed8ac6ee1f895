"""Data: text to shards (prepare), shards to documents (store, mds), documents to packed batches (plan, loader)."""
