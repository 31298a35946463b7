"""Errors whose reader is a person.

A :class:`UserError` means that something outside the code is wrong: a key, a file, a machine too small. Its
message is one sentence or two: what is wrong, where (file, key, line), what to do. The command lines print it
without a traceback and exit with :data:`EXIT_CODE`. A broken invariant of our own is an ``assert`` instead.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from megatron_lite.utils.hydra import end_other_ranks
from megatron_lite.utils.log import rank_from_environment

EXIT_CODE = 2
"""Exit status of every command that stops on a :class:`UserError` (argparse uses the same)."""

LOST_RANK = 104
"""Exit status of a rank that cannot go on because another one has ended (the number of ECONNRESET)."""

HANG = 124
"""Exit status of a rank that has found that some rank hangs (``timeout`` of coreutils uses the same)."""

ERRORS_VARIABLE = "MEGATRON_LITE_ERRORS"
"""Environment variable by which the launcher names the folder where ranks leave their message, each in a file
called as its rank. The launcher shows it, once when several ranks say the same."""

TURN_SECONDS = 5.0
"""How long rank 0 may speak alone under a launcher that is not ours."""

P = ParamSpec("P")


class UserError(ValueError):
    """Something the user can put right."""

    exit_code = EXIT_CODE


class ConfigError(UserError):
    """A configuration key or file is wrong."""


class DataError(UserError):
    """A data file, a tokenizer or a corpus is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not fit."""


class LostRankError(UserError):
    """Another rank has ended, and this one cannot go on without it."""

    exit_code = LOST_RANK


def command_line(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a ``main()`` so that a :class:`UserError`, a full disk or Ctrl-C ends it with one line.

    Returns the exit status: that of ``main``, or the error's, or 130 after Ctrl-C as shells have it.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            status = guarded(*args, **kwargs)
        except Exception:
            atexit.register(end_other_ranks, 1)  # which comes after the traceback
            raise
        if status not in (0, LOST_RANK, HANG):  # of these the others learn without us
            end_other_ranks(status)
        return status

    def guarded(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            _tell(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _tell(f"{where}{error.strerror or error}")
            return EXIT_CODE

    return run


def _tell(message: str) -> None:
    """Show ``message``, which the other ranks may have in common with this one.

    Our launcher is left to compare them. Another launcher ends all ranks soon after the first that fails:
    rank 0 speaks at once, and the others, with their rank, only if they are still there some seconds later.
    """
    folder, rank = os.environ.get(ERRORS_VARIABLE), rank_from_environment()
    if folder is not None and Path(folder).is_dir():
        Path(folder, str(rank)).write_text(message)
    elif rank == 0:
        print(f"error: {message}", file=sys.stderr)
    else:
        time.sleep(TURN_SECONDS)
        print(f"error: [rank {rank}] {message}", file=sys.stderr)
