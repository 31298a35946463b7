"""The folder of checkpoints: a kill at any moment loses none, what cannot go is told, the right ones go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

from megatron_lite.checkpoint import folder as module
from megatron_lite.checkpoint import save as saving
from megatron_lite.checkpoint.folder import complete_steps, find_checkpoint, remove_old
from megatron_lite.checkpoint.index import Index
from megatron_lite.checkpoint.save import make_empty, publish

CONTENT = "weights_00000.safetensors"


class Killed(BaseException):
    """What ends the process, here only the code that would run in it."""


def save(folder: Path, step: int, content: str, keep_last: int | None = None) -> None:
    """A checkpoint without parameters, saved as rank 0 does it."""
    temporary = folder / f".tmp-global_step{step}"
    make_empty(temporary)
    (temporary / CONTENT).write_text(content)
    index = Index(step, 1, "AdamW", {"step": step}, {}, {}, {}, {}, [], {})
    publish(temporary, folder / f"global_step{step}", index, keep_last)


def contents(folder: Path) -> dict[str, str]:
    """By name, what the checkpoints are (those that only look like one fail here)."""
    return {path.name: (path / CONTENT).read_text() for path in folder.glob("global_step*")}


@contextmanager
def killed_before(change: int) -> Iterator[None]:
    """Within: the first ``change`` calls that change the disk happen, the next does not, nor any other."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count > change:
                raise Killed
            return function(*arguments, **options)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield


def killed_saves(
    tmp_path: Path, before: Callable[[Path], object], again: Callable[[Path], object]
) -> Iterator[Path]:
    """For every moment at which ``again`` may be killed, the folder that is left; ``before`` made it."""
    change, killed = 0, True
    while killed:
        folder = tmp_path / str(change)
        folder.mkdir()
        before(folder)
        killed = False
        try:
            with killed_before(change):
                again(folder)
        except Killed:
            killed = True
        yield folder
        change += 1
    assert change > 8, "there were moments to be killed in"


def test_a_kill_at_any_moment_leaves_a_checkpoint_of_each_step(tmp_path: Path) -> None:
    """The newest is saved once more, and the oldest goes; the next save leaves nothing but checkpoints."""

    def before(folder: Path) -> None:
        save(folder, 5, "old")
        save(folder, 10, "old")
        save(folder, 15, "old")

    for folder in killed_saves(tmp_path, before, lambda folder: save(folder, 15, "new", keep_last=2)):
        found = find_checkpoint(folder)
        assert (found / CONTENT).read_text() in ("old", "new")
        assert complete_steps(folder) in ([5, 10, 15], [10, 15])
        was = (found / CONTENT).read_text()
        save(folder, 20, "next", keep_last=3)
        assert contents(folder) == {"global_step10": "old", "global_step15": was, "global_step20": "next"}
        assert sorted(path.name for path in folder.iterdir()) == [*sorted(contents(folder)), "latest"]


def steps_begun_from(folders: list[Path]) -> list[str | None]:
    """What a run whose ``load`` and ``save`` are each of ``folders`` begins from."""
    from training.training_runs import KEYS

    from megatron_lite.config import config_from_keys
    from megatron_lite.training.run import checkpoint_to_load

    found = []
    for folder in folders:
        keys = {**KEYS, "data_path": "unused", "load": str(folder), "save": str(folder)}
        checkpoint = checkpoint_to_load(config_from_keys(keys))
        found.append(None if checkpoint is None else checkpoint.name)
    return found


def test_a_kill_in_the_first_save_begins_afresh_or_from_what_is_complete(tmp_path: Path) -> None:
    folders = list(killed_saves(tmp_path, lambda _: None, lambda folder: save(folder, 5, "first")))
    begun = run_ranks(steps_begun_from, 1, folders)[0]
    assert begun == ["global_step5" if (folder / "global_step5").exists() else None for folder in folders]
    without_latest = [folder for folder in folders if not (folder / "latest").exists()]
    assert any((folder / "global_step5").exists() for folder in without_latest), "the moment between the two"


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sentences of warnings, as they are said."""
    said: list[str] = []
    monkeypatch.setattr(module.LOGGER, "warning", lambda text, *values: said.append(text % values))
    return said


def test_what_cannot_be_removed_is_told_once_and_goes_when_it_can(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a file that somebody has open stays."""
    save(tmp_path, 5, "old")
    unlink = Path.unlink

    def busy(path: Path, missing_ok: bool = False) -> None:
        if path.name == CONTENT:
            raise OSError(16, "Device or resource busy")
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        save(tmp_path, 10, "a", keep_last=1)
        save(tmp_path, 10, "b", keep_last=1)
        save(tmp_path, 15, "c", keep_last=1)
    first, second, *_ = warnings
    assert (
        first
        == f"{tmp_path}/global_step5 cannot be removed (Device or resource busy): what is left of it stays"
    )
    assert ".tmp-removed-" in second
    assert len(warnings) == len(set(warnings))
    assert contents(tmp_path) == {"global_step15": "c"}
    save(tmp_path, 20, "d", keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step20", "latest"]


def test_a_write_protected_checkpoint_stays(
    tmp_path: Path, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        save(tmp_path, step, "old")
    access = os.access  # tests may run as root, who may do anything
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "global_step5" and access(path, mode)
    )
    for step in (15, 20):
        save(tmp_path, step, "new", keep_last=1)
    assert contents(tmp_path) == {"global_step5": "old", "global_step20": "new"}
    assert warnings == [
        f"{tmp_path}/global_step5 cannot be removed (it is write-protected): what is left of it stays"
    ]


@pytest.mark.parametrize(
    ("there", "saved", "keep_last", "stay", "told"),
    [
        ([5, 10, 15], [20], 3, [10, 15, 20], 0),
        ([10], [20], 5, [10, 20], 0),
        ([80, 90, 100], [60], 3, [60, 90, 100], 1),
        ([80, 90, 100], [60, 65, 70], 3, [60, 65, 70], 1),
        ([50, 80, 90, 100], [60, 65, 70, 75], 3, [65, 70, 75], 1),
        ([50, 60, 70, 80], [65], 1, [65], 1),
        ([80, 90, 100], [80, 90], 2, [80, 90], 1),
        ([80, 90, 100], [70], 4, [70, 80, 90, 100], 0),
    ],
)
def test_which_checkpoints_stay(
    there: list[int],
    saved: list[int],
    keep_last: int,
    stay: list[int],
    told: int,
    tmp_path: Path,
    warnings: list[str],
) -> None:
    """Those of this run before those of a branch that it left behind; a warning says so, once."""
    for step in there:
        save(tmp_path, step, "there")
    for step in saved:
        save(tmp_path, step, "saved", keep_last)
        assert find_checkpoint(tmp_path).name == f"global_step{step}"
    assert complete_steps(tmp_path) == stay
    assert len(warnings) == told
    assert all("left behind when this run began from an earlier one" in sentence for sentence in warnings)


def test_removing_gives_signs(tmp_path: Path) -> None:
    """Every file is one: to remove a large one may take long."""
    signs: list[str] = []

    def sign(doing: str, longer: bool = False) -> None:
        assert not longer
        signs.append(doing)

    for step in (5, 10, 15):
        save(tmp_path, step, "old")
    remove_old(tmp_path, 15, 1, sign)
    expected = [f"removing {tmp_path / name}" for name in ("global_step5", "global_step10") for _ in range(2)]
    assert signs == expected
    (tmp_path / ".tmp-removed-x").mkdir()
    (tmp_path / ".tmp-removed-x" / "file").touch()
    saving.make_empty(tmp_path / ".tmp-global_step20", sign)
    assert signs[4:] == [f"removing {tmp_path / '.tmp-removed-x'}"]
    assert not (tmp_path / ".tmp-removed-x").exists()
