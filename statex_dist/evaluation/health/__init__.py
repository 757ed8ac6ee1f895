"""Whether a model's states stay sound past its training length, and how much they hold."""
