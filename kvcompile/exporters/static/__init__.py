"""A compiled model as two programs without control flow: prefill and decode over a cache of fixed capacity."""
