"""What a compiled model is measured by: needle, perplexity, speed, and the proof that its plan ran."""
