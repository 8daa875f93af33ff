"""EleutherAI's lm_eval over a compressed cache. Importing it imports lm_eval, with torch and transformers."""

from kvcompile.lm_eval.model import CompiledLM, main

__all__ = ["CompiledLM", "main"]
