"""A Hugging Face folder as a checkpoint: ``convert_from_hf.py models/pythia-70m runs/pythia --verify``.

Then ``deepy.py train.py OUT/model.yml my-data.yml`` fine-tunes it, and ``tools/generate.py OUT`` writes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from megatron_lite.generation import load_model
from megatron_lite.hf import import_folder, verify_folder
from megatron_lite.hf.assemble import MODEL_FILE
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging


@command_line
def main() -> int:
    """Parse the command line, convert, verify; 1 when both do not compute the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="config.json, weights and tokenizer, as transformers has them"
    )
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights, and precision of the run (default: as in the files)"
    )
    parser.add_argument(
        "--make-vocab-size-divisible-by", type=int, metavar="N", dest="rows_multiple",
        help="add rows for all ids of the tokenizer, up to a multiple of N, so that tensor parallelism can "
        "divide them (default: exactly the folder's rows)",
    )  # fmt: skip
    parser.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="FIELD",
        help="fields of config.json, unknown here, that do not change what the model computes",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action="store_true", help="load it with transformers and compare logits and token ids"
    )
    arguments = parser.parse_args()
    setup_logging()
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    import_folder(arguments.folder, arguments.out, dtype, arguments.ignore, arguments.rows_multiple)
    print(f"wrote {arguments.out}; train with: deepy.py train.py {arguments.out / MODEL_FILE} DATA.yml")
    if not arguments.verify:
        return 0
    model = load_model(arguments.out, torch.device("cpu"), torch.float32)
    result = verify_folder(arguments.folder, model.gpt, model.tokenizer, dtype)
    print(result.report())
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main())
