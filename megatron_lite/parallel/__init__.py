"""Floor 2: who computes what. The parallel context, and how each parameter is declared."""
