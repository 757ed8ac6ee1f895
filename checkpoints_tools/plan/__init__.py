"""Plans of an expansion: options, search for a size, memory, forgetting."""
