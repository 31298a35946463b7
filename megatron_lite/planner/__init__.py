"""Floor 2: what a run needs. Parameters, floating-point operations and memory, by formula. No torch."""

from megatron_lite.planner.fit import Suggestion, fits, suggest_fitting_keys
from megatron_lite.planner.flops import flops_per_sequence
from megatron_lite.planner.machine import Gpu, Machine, this_machine
from megatron_lite.planner.memory import MemoryEstimate, estimate_memory
from megatron_lite.planner.parameters import count_parameters, parameters_by_place

__all__ = [
    "Gpu",
    "Machine",
    "MemoryEstimate",
    "Suggestion",
    "count_parameters",
    "estimate_memory",
    "fits",
    "flops_per_sequence",
    "parameters_by_place",
    "suggest_fitting_keys",
    "this_machine",
]
