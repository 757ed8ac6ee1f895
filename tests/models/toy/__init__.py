"""A toy family: what an engineer writes to add one. Two modules, and a call of ``register``."""
