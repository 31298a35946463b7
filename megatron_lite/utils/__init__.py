"""Floor 0: what every other package may use. Nothing here imports another package of this project."""
