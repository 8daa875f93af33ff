"""Kernels in Triton: fragments, the generators that compose them, and the route that launches what they wrote."""
