"""Kernels in Triton: fragments, the generators that compose them, and the backend that launches what they wrote."""
