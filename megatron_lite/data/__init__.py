"""Floor 2: text to tokens to samples."""
