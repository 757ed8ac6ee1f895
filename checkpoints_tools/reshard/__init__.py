"""One checkpoint into another layout."""
