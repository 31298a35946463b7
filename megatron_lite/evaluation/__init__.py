"""Floor 6: scores of a trained model.

lm-eval's tasks, and the perplexity of a text, on any checkpoint and any number of ranks.
"""

from megatron_lite.evaluation.run import Replicas, open_replicas
from megatron_lite.evaluation.tasks import Choice

__all__ = ["Choice", "Replicas", "open_replicas"]
