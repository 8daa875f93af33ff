"""Engines that serve a compiled model to many requests at once."""
