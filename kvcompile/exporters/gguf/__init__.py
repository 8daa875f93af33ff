"""The exporter gguf: one file for llama.cpp."""
