"""What is done to entries beside attention: they are encoded, moved, and chosen among."""
