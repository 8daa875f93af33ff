"""A text read again before a selection, so that scores see the queries of a reader who repeats it."""
