"""Kernels in C++: the toolchain, the vectors they share, and the generators."""
