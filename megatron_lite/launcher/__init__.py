"""Floor 3: from a checked configuration to running ranks."""
