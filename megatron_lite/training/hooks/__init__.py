"""What hangs on the training loop: figures, evaluation, checkpoints, signals."""
