"""What the forkserver of ``ranks.py`` imports once, before it forks any rank."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import deepspeed
import torch._dynamo  # noqa: F401  (the first optimizer would import it: a second per rank)

import megatron_lite.training.run  # noqa: F401

# The shared-memory all-reduce would be compiled with g++ at the first init_distributed (over a minute).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
