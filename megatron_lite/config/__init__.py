"""Floor 1: what a run is. YAML to typed, frozen sections to the DeepSpeed dictionary. No torch."""
