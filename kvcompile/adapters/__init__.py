"""Attention adapters: one module per family of attention layers."""
