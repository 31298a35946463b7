"""Floor 4: scores."""
