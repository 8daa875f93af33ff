"""Tasks: what a model is asked, as data, and what it still answers over a compressed cache."""
