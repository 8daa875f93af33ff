"""What is asked: stacks on models, one, an artifact, one in memory, or several side by side."""
