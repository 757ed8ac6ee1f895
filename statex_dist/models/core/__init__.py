"""What all families share: the recurrent mixer, blocks, trunk, head, norms and the state of a layer."""
