"""Families of attention layers: an adapter, where its weights lie, and the architectures that have it, a file each."""
