"""The cache: bytes, lengths and true positions, dense or ragged."""

from kvcompile.cache.cache import KVCache, Step

__all__ = ["KVCache", "Step"]
