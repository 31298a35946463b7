"""Floor 5: engine, loop, objectives, optimizers, schedules, hooks."""

import os

import torch

# DeepSpeed picks its accelerator while it is imported, by probing for several; without CUDA, name the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
