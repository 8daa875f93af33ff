"""Analyses of an original model: what its attention does on given prompts, measured, drawn and reported."""
