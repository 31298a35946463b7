"""A DeepSpeed trainer for large GPT-like language models, from a laptop to a cluster."""

__version__ = "0.1.0"
