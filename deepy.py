"""Launch a run: ``python deepy.py train.py CONF.yml [MORE.yml ...] [-d CONF_DIR] [--set KEY=VALUE ...]``.

Reads and checks the configuration, says what will run and whether it fits, then starts one SCRIPT per rank.
"""

import sys

from megatron_lite.launcher import main
from megatron_lite.utils.streams import outlive_readers

if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
