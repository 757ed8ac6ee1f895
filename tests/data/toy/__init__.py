"""A packing strategy that is not part of the library: one file, registered by one call."""
