"""Attention over a cache layout: specs, references and the routes that run them. Import as `kvcompile.kernels`."""
