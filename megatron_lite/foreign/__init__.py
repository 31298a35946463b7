"""Floor 6: checkpoints that other trainers wrote."""

from megatron_lite.foreign.modelscope import import_modelscope
from megatron_lite.foreign.neox import import_neox

__all__ = ["import_modelscope", "import_neox"]
