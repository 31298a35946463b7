"""Floor 3: the transformer as one list of layers."""
