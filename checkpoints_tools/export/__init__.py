"""What transformers needs of an exported model besides weights."""
