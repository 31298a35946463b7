"""What DeepSpeed 0.19.8 does that we do not want, each described beside its remedy."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.pipe.schedule import ReduceTiedGrads
from deepspeed.runtime.zero import partition_parameters
from deepspeed.utils import groups


def quiet_logs() -> None:
    """Turn DeepSpeed's log down to warnings, and off where its warnings tell our users nothing.

    What goes: "untested optimizer" (tested here), a hint about a client optimizer, torch's notes on
    deprecated calls that DeepSpeed makes, and the memory report that BF16_Optimizer always prints.
    """
    bf16_optimizer.see_memory_usage = lambda *_message, **_options: None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"deepspeed\..*")
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning
    )


def allow_fp16_on_cpu() -> None:
    """Let fp16 train on every CPU.

    DeepSpeed refuses those without fp16 instructions; torch computes fp16 there too, only slower.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        accelerator.is_fp16_supported = lambda: True


def skip_shared_memory_build() -> None:
    """Keep ``init_distributed`` from compiling ``deepspeed_shm_comm`` with g++.

    That takes 75 s and fails without a compiler. It serves ``inference_all_reduce`` only, which training
    never calls.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_muon(compiled: bool) -> None:
    """Import DeepSpeed's Muon before ZeRO does, with or without ``torch.compile`` around its kernels.

    ZeRO 1-3 import Muon whatever the optimizer is (``zero/utils.py``), and its decorators import Inductor: 3
    seconds of every start. Compiling itself takes 40 s or more on a CPU, for no speed there.
    """
    from deepspeed.runtime import compiler

    original = compiler.compile
    if not compiled:
        compiler.compile = _as_written
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    finally:
        compiler.compile = original


def _as_written(*_args: Any, **_options: Any) -> Any:
    """A ``compile`` decorator that leaves the function alone."""
    return lambda function: function


def hand_over(mpu: Any) -> Any:
    """``mpu``, and DeepSpeed made to forget the one of an engine before.

    It keeps the last mpu that it was given in a module, and asks that one when it is given none.
    """
    groups.mpu = mpu
    return mpu


def reduce_only_across_ranks(engine: Any, data_size: int) -> None:
    """With one data-parallel rank, skip the gradient all-reduce of stage 0 and of stage 1 in bf16.

    It would flatten, "reduce", scale and copy back every gradient, in bf16 also round it: passes over
    memory for nothing. The other optimizers do more than reducing in the same place, and keep it.
    """
    if data_size == 1 and (
        engine.zero_optimization_stage() == 0 or isinstance(engine.optimizer, bf16_optimizer.BF16_Optimizer)
    ):
        engine.enable_backward_allreduce = False
        engine.pipeline_enable_backward_allreduce = False


def reduce_tied_gradients_wherever_they_are(engine: Any) -> None:
    """Let a pipeline sum the gradients of tied weights in fp16, too.

    With gradients accumulated in fp32, ZeRO 1 keeps them in ``grad_accum``. DeepSpeed's pipeline looks into
    ``grad``, finds None, and goes on in silence with copies that drift apart.
    """
    optimizer = engine.optimizer

    def reduce_tied_gradients(_engine: Any) -> None:
        for weight, group in engine.module.get_tied_weights_and_groups():
            in_buffer = isinstance(optimizer, bf16_optimizer.BF16_Optimizer)
            gradient = weight._hp_grad if in_buffer else optimizer.get_gradient_for_reduction(weight)
            dist.all_reduce(gradient, group=group)

    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, ReduceTiedGrads: reduce_tied_gradients}


def add_up_norms_of_experts(engine: Any) -> None:
    """Let ZeRO 3's gradient norm add up what tensor ranks have of divided experts.

    It takes their groups to reach over the tensor ranks, too, as those of its AutoEP may.
    """
    if engine.zero_optimization_partition_weights():
        engine.optimizer._grad_norm_counts_every_rank = lambda _parameters, _group: False


def let_the_loss_scale_rest(engine: Any) -> None:
    """Keep fp16's scaler from raising a bare Exception at its smallest scale: we say it better."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        scaler.raise_error_at_min_scale = False


def leave_out_what_overflows(optimizer: Any) -> None:
    """Let ``optimizer`` do nothing while its ``overflow`` is set, which the engine sets at stage 0.

    There DeepSpeed applies every gradient, also one that is not finite. It counts a step as skipped by that
    attribute of ZeRO's optimizers.
    """
    update = optimizer.step

    def step(*args: Any, **options: Any) -> Any:
        return None if optimizer.overflow else update(*args, **options)

    optimizer.overflow = False
    optimizer.step = step


def drop_offloaded_gradients_of_a_skipped_step(engine: Any) -> None:
    """Let ZeRO 1 and 2 with an offloaded optimizer train on after a step that overflowed.

    They add 16-bit parameters' gradients up in a buffer, which DeepSpeed lets go of after an update, and also
    after a skipped step, but not when it offloads. What is not finite stays in it, and every later step is
    skipped, too.
    """
    optimizer = engine.optimizer
    if not getattr(optimizer, "cpu_offload", False):
        return
    reset = optimizer.reset_cpu_buffers

    def reset_all() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_all


def copy_out_of_swap_buffers() -> None:
    """Give parameters from NVMe memory of their own where nothing is gathered: on one rank that is a CPU.

    DeepSpeed lets the parameter be the buffer that its file was read into, and reads the next file into it
    when the module is done. What recomputed activations saved of the weight for the backward is then another
    weight: gradients are wrong, in silence.
    """
    partition_parameters._no_gather_coalesced = _no_gather_copied


_no_gather = partition_parameters._no_gather_coalesced


def _no_gather_copied(params: Iterable[Any]) -> Any:
    params = list(params)
    handle = _no_gather(params)
    for parameter in params:
        if parameter.nvme_swapper is not None and parameter.data_ptr() == parameter.ds_tensor.data_ptr():
            parameter.data = parameter.data.clone()
    return handle
