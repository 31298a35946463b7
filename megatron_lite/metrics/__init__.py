"""Floor 4: figures to the terminal and to back ends."""
