"""The cache: bytes, lengths and true positions, dense or ragged."""
