"""Floor 4: state to disk and back."""
