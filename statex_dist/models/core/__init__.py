"""What all families share: the recurrent mixer, blocks, norms and the state of a layer."""
