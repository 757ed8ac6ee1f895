"""Writing a target: tensors as streams of blocks, journaled files, a directory that is whole or not there."""
