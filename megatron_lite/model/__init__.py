"""Floor 3: the transformer as one list of layers."""

from megatron_lite.model.cache import KVCache
from megatron_lite.model.gpt import GPT, build_gpt
from megatron_lite.model.loss import token_loss

__all__ = ["GPT", "KVCache", "build_gpt", "token_loss"]
