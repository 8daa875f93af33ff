"""A declarative compiler for the KV cache of Hugging Face causal language models."""
