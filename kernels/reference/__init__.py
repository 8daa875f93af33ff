"""What kernels compute, in plain PyTorch: the oracles of generated ones, and what backends without them run."""

from kvcompile.kernels.reference.attention import attend, biases, column_sums, fall, hidden, required, row, softmax

__all__ = ["attend", "biases", "column_sums", "fall", "hidden", "required", "row", "softmax"]
