"""A block transformer at work: blocks of tokens, and the few entries of the current one."""
