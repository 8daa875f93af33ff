"""One context, several questions in turn."""
