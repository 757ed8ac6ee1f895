"""Models of transformers whose recurrent layers are ours: configurations, tensors, names, mixers and the model."""
