"""Model families, one folder each: config (geometry), layout (tensor names), expand (surgery), mixer (forward)."""
