"""Attention over a cache layout: specs, references and the backends that run them. Import as `kvcompile.kernels`."""
