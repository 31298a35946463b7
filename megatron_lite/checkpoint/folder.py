"""Where checkpoints are: their names, which is the latest, which are old."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from megatron_lite.checkpoint.index import INDEX_NAME
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.files import write_text

LATEST = "latest"
_NAME = re.compile(r"global_step(\d+)")


def checkpoint_name(step: int) -> str:
    """The folder name of the checkpoint after ``step`` optimizer steps."""
    return f"global_step{step}"


def complete_steps(folder: Path) -> list[int]:
    """The steps of the complete checkpoints in ``folder``, ascending."""
    if not folder.is_dir():
        return []
    matches = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted(int(match[1]) for match, path in matches if match and (path / INDEX_NAME).is_file())


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
    checkpoint = folder / name
    if not _NAME.fullmatch(name) or not (checkpoint / INDEX_NAME).is_file():
        raise CheckpointError(f"{checkpoint} is not a complete checkpoint: {_what_is_there(folder, name)}")
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


def remove_old(folder: Path, newest: int, keep_last: int) -> None:
    """Remove all complete checkpoints but that of step ``newest`` and the ``keep_last`` - 1 last others."""
    others = [step for step in complete_steps(folder) if step != newest]
    for step in others[: max(0, len(others) - (keep_last - 1))]:
        remove_checkpoint(folder / checkpoint_name(step))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint folder; interrupted half-way it is no longer taken for a complete one."""
    (checkpoint / INDEX_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)
