"""Files are whole or not there; errors end a command with one line and a status."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.utils.errors import ConfigError, command_line
from megatron_lite.utils.files import atomic_path, write_text
from megatron_lite.utils.seeds import derive_seed


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")

    def fail_halfway() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail_halfway()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_reader_never_sees_a_part(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        temporary.write_text("whole")
    assert target.read_text() == "whole"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a.yml:3: wrong"), 2, "error: a.yml:3: wrong\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.bin"),
            2,
            "error: x.bin: No space left on device\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_command_line_ends_with_one_line(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command_line
    def main() -> None:
        raise error

    assert main() == status
    assert capsys.readouterr().err == line


def test_our_own_mistakes_keep_their_traceback() -> None:
    @command_line
    def main() -> None:
        raise AssertionError("an invariant")

    with pytest.raises(AssertionError):
        main()


def test_seeds_are_the_same_in_another_process_and_differ_by_purpose() -> None:
    code = "from megatron_lite.utils.seeds import derive_seed; print(derive_seed(7, 'a', 1))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) == derive_seed(7, "a", 1)
    seeds = {derive_seed(seed, name, i) for seed in (1, 2) for name in ("a", "b") for i in range(50)}
    assert len(seeds) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive_seed(1, "ab", "c") != derive_seed(1, "a", "bc")
