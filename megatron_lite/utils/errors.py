"""Errors whose reader is a person.

A :class:`UserError` means that something outside the code is wrong: a key, a file, a machine too small. Its
message is one sentence or two: what is wrong, where (file, key, line), what to do. The command lines print it
without a traceback and exit with :data:`EXIT_CODE`. A broken invariant of our own is an ``assert`` instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

EXIT_CODE = 2
"""Exit status of every command that stops on a :class:`UserError` (argparse uses the same)."""

P = ParamSpec("P")


class UserError(ValueError):
    """Something the user can put right."""


class ConfigError(UserError):
    """A configuration key or file is wrong."""


class DataError(UserError):
    """A data file, a tokenizer or a corpus is wrong."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not fit."""


def command_line(main: Callable[P, int | None]) -> Callable[P, int]:
    """Wrap a ``main()`` so that a :class:`UserError`, a full disk or Ctrl-C ends it with one line.

    Returns the exit status: that of ``main``, or :data:`EXIT_CODE`, or 130 after Ctrl-C as shells have it.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_CODE

    return run
