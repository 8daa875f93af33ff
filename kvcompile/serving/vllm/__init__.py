"""vLLM: a plugin that frees the blocks of what a selection drops of a prompt. Nothing of vLLM is imported here."""
