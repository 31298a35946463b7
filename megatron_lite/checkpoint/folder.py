"""Where checkpoints are: their names, which is the latest, which are old and go."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from functools import cache
from pathlib import Path

from megatron_lite.checkpoint.index import INDEX_NAME
from megatron_lite.checkpoint.signs import Sign, unheard
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import LOGGER

LATEST = "latest"

TEMPORARY = ".tmp-"
"""How the names of folders begin that are not (or no longer) checkpoints."""

REPLACED = f"{TEMPORARY}replaced-"
"""And this those that a new one of the same step is about to replace; its name follows."""

REMOVED = f"{TEMPORARY}removed-"
"""And this those that are being removed."""

_NAME = re.compile(r"global_step(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after ``step`` optimizer steps."""
    return f"global_step{step}"


def complete_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    names = {path.name.removeprefix(REPLACED) for path in folder.iterdir()}
    matches = [_NAME.fullmatch(name) for name in names if _complete(folder, name)]
    return sorted(int(match[1]) for match in matches if match)


def _complete(folder: Path, name: str) -> Path | None:
    """The complete checkpoint ``name``, be it under the name it had when a kill came between two renames."""
    places = (folder / name, folder / f"{REPLACED}{name}")
    return next((place for place in places if (place / INDEX_NAME).is_file()), None)


def find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The checkpoint that ``folder`` means.

    Args:
        folder: a checkpoint itself, or a folder of checkpoints with the file ``latest``.
        step: which one; the latest when None.

    Raises:
        CheckpointError: it is not there, not complete, or of another format.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).is_file():
        if step is not None and folder.name != checkpoint_name(step):
            raise CheckpointError(f"{folder} is one checkpoint, but not the one of step {step}")
        return folder
    if step is not None:
        name = checkpoint_name(step)
    else:
        try:
            name = (folder / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise CheckpointError(f"no checkpoint in {folder}: {_what_is_there(folder)}") from None
    checkpoint = _complete(folder, name) if _NAME.fullmatch(name) else None
    if checkpoint is None:
        raise CheckpointError(f"{folder / name} is not a complete checkpoint: {_what_is_there(folder, name)}")
    return checkpoint


def _what_is_there(folder: Path, name: str = "") -> str:
    if not folder.is_dir():
        return "the folder does not exist"
    if any((folder / name).glob("*.pt")):
        return (
            f"it has DeepSpeed's own files (*.pt), which this program does not read; {INDEX_NAME} is missing"
        )
    steps = ", ".join(map(str, complete_steps(folder)))
    return f"complete ones are there for steps {steps}" if steps else f"nothing there has an {INDEX_NAME}"


def set_latest(folder: Path, step: int) -> None:
    """Let ``latest`` name the checkpoint of ``step`` (atomic)."""
    write_text(folder / LATEST, checkpoint_name(step) + "\n")


def replace_checkpoint(temporary: Path, target: Path) -> Path | None:
    """Give the complete checkpoint ``temporary`` the name ``target``; the one that had it is returned."""
    replaced = None
    if target.exists():
        replaced = target.with_name(f"{REPLACED}{target.name}")
        os.rename(target, replaced)
    os.rename(temporary, target)
    return replaced


def remove_leftovers(folder: Path, sign: Sign = unheard) -> None:
    """Remove what runs that were killed while saving left in ``folder``.

    Where the kill came between the two renames of :func:`replace_checkpoint`, the checkpoint that was to be
    replaced is the only one of its step: it gets its name back.
    """
    for replaced in folder.glob(f"{REPLACED}*"):
        target = folder / replaced.name.removeprefix(REPLACED)
        if not target.exists():
            os.rename(replaced, target)
    for leftover in folder.glob(f"{TEMPORARY}*"):
        remove(leftover, sign)
    for leftover in folder.glob(f".{LATEST}.*.tmp"):
        leftover.unlink()


def remove_old(folder: Path, newest: int, keep_last: int, sign: Sign = unheard) -> None:
    """Let ``keep_last`` (at least 1) complete checkpoints stay: that of step ``newest`` and the last before.

    Later steps were left behind by a run that began from an earlier one. They stay only where there are too
    few before ``newest``: the checkpoints that lead to the latest one never make room for them.
    """
    steps = complete_steps(folder)
    left_behind = [step for step in steps if step > newest]
    going = [*left_behind, *(step for step in steps if step <= newest)][:-keep_last]
    if any(step > newest for step in going):
        _warn_once(
            f"{folder} has checkpoints of later steps, left behind when this run began from an earlier one: "
            "keep_last_n_checkpoints removes them before its own"
        )
    for step in going:
        remove(folder / checkpoint_name(step), sign)


def remove(path: Path, sign: Sign = unheard) -> None:
    """Remove a folder of files; what cannot be removed stays, and a warning tells of it.

    A temporary name comes first: a kill half-way leaves no part of a checkpoint under a checkpoint's name,
    and the next save removes the rest, as it does where a file cannot be removed now (NFS keeps those that
    somebody has open). A checkpoint that is write-protected stays as it is.
    """
    aside = path
    try:
        if not path.name.startswith(TEMPORARY) and not os.access(path, os.W_OK):
            raise PermissionError(None, "it is write-protected")
        if not path.name.startswith(REMOVED):
            aside = path.with_name(f"{REMOVED}{secrets.token_hex(4)}-{path.name}")
            os.rename(path, aside)
        for file in aside.iterdir():
            sign(f"removing {path}")
            if not file.is_dir():
                file.unlink()
        shutil.rmtree(aside)
    except OSError as error:
        _warn_once(f"{path} cannot be removed ({error.strerror}): what is left of it stays")


@cache
def _warn_once(sentence: str) -> None:
    """Log ``sentence`` as a warning, the first time: it would be said after every save."""
    LOGGER.warning("%s", sentence)
