"""A compiled model at work: forward, cache, observation and eviction."""
