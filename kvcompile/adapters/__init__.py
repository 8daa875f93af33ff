"""Attention adapters: one module per family of attention layers, and the table of known architectures."""
