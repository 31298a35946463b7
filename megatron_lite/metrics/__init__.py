"""Floor 4: figures to the terminal and to back ends.

Figures are plain floats under slash names, the same on the terminal and in every back end:

=========================  ===============================================================
``train/loss``             mean loss of the step, nats a token
``train/lr``               learning rate
``train/grad_norm``        norm of the gradient before clipping
``train/loss_scale``       fp16 loss scale
``train/tokens``           tokens seen so far
``speed/tokens_per_second`` of the whole run, all ranks
``speed/mfu``              share of the devices' peak, 0 to 1
``memory/bytes``           in use on rank 0
``valid/loss``             evaluation loss, nats a token (with ``mlm_training``, a hidden one)
``valid/perplexity``       its exponential
``valid/bits_per_byte``    its equivalent per byte of text, independent of the tokenizer (not with
                           ``mlm_training``)
=========================  ===============================================================
"""

from megatron_lite.metrics.backends import BACKENDS, Backend, open_backends

__all__ = ["BACKENDS", "Backend", "open_backends"]
