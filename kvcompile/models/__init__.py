"""Where the weights come from: folders, hub, GGUF files, the default model."""
