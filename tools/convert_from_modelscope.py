"""ModelScope's Chinese GPT-3 as a checkpoint: ``convert_from_modelscope.py their/gpt3_1.3B runs/mine``.

Then ``deepy.py train.py OUT/model.yml my-data.yml`` fine-tunes it, under any layout.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_lite.foreign import import_modelscope
from megatron_lite.hf.assemble import MODEL_FILE
from megatron_lite.utils.errors import command_line
from megatron_lite.utils.log import setup_logging


@command_line
def main() -> None:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", type=Path, help="config.json, tokenizer.json, model/mp_rank_*_model_states.pt"
    )
    parser.add_argument("out", type=Path, help="the folder to write; must not exist, or be empty")
    arguments = parser.parse_args()
    setup_logging()
    import_modelscope(arguments.folder, arguments.out)
    print(f"wrote {arguments.out}; train with: deepy.py train.py {arguments.out / MODEL_FILE} DATA.yml")


if __name__ == "__main__":
    sys.exit(main())
