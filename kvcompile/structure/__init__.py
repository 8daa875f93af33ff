"""Structural conversions: fewer KV heads, fewer layers that own a cache, before the graph is traced."""
