"""Reading every layout of a checkpoint, without torch: detection, indices, pieces of tensors and their checksums."""
