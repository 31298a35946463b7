"""Write a checkpoint as a Hugging Face folder: ``convert_to_hf.py runs/demo/checkpoints runs/demo/hf``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_lite.checkpoint import find_checkpoint
from megatron_lite.generation import load_model
from megatron_lite.hf import export_folder, verify_folder
from megatron_lite.hf.families import FAMILIES
from megatron_lite.hf.shards import parse_size
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging


@command_line
def main() -> int:
    """Parse the command line, convert, verify; 1 when the folder does not compute what the model does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--iteration", type=int, help="step of the checkpoint in the folder (default: the latest)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32, exact)"
    )
    parser.add_argument(
        "--family", choices=FAMILIES, help="model_type to write (default: the first that fits the model)"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of a weights file (default: 5GB)")
    parser.add_argument(
        "--verify", action="store_true", help="load it with transformers and compare logits and token ids"
    )
    arguments = parser.parse_args()
    setup_logging()
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.iteration)
    size = parse_size(arguments.max_shard_size)
    dtype = DTYPES[arguments.dtype]
    export_folder(checkpoint, arguments.out, dtype, size, arguments.family)
    print(f"wrote {arguments.out}")
    if not arguments.verify:
        return 0
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    result = verify_folder(arguments.out, model.gpt, model.tokenizer, dtype)
    print(result.report())
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
