"""Floor 2: what a run needs (parameters, memory, FLOPs). No torch."""
