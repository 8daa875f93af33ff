"""Block transformers in training: all blocks of a batch at once."""
