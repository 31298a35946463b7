"""What YAML files and --set words become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.config.reader import read_file, read_override
from megatron_lite.utils.errors import ConfigError

NEOX_STYLE = """\
# GPT-NeoX writes its files so
{
  "num-layers": 12,
  "no-weight-tying": True,
  "optimizer": {
    "type": "Adam",
    "params": {"lr": 6e-4, "betas": [9e-1, 0.95],},
  },
  "zero_optimization": {"reduce_bucket_size": 5e8, "overlap_comm": False,},
}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yml"
    path.write_text(text)
    return path


def test_flow_map_with_trailing_commas_and_dashes(tmp_path: Path) -> None:
    entries = read_file(write(tmp_path, NEOX_STYLE))
    assert {entry.key: entry.value for entry in entries} == {
        "num_layers": 12,
        "no_weight_tying": True,
        "optimizer": {"type": "Adam", "params": {"lr": 0.0006, "betas": [0.9, 0.95]}},
        "zero_optimization": {"reduce_bucket_size": 500000000, "overlap_comm": False},
    }
    assert isinstance(entries[3].value["reduce_bucket_size"], int)


def test_every_key_knows_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, NEOX_STYLE)
    entries = {entry.key: entry for entry in read_file(path)}
    lines = NEOX_STYLE.splitlines()
    for key, text in (("num_layers", '"num-layers"'), ("zero_optimization", '"zero_opt')):
        line = next(number for number, line in enumerate(lines, 1) if text in line)
        assert entries[key].where() == f"{path}:{line}: "
    assert entries["optimizer"].where("optimizer.params.lr") == f"{path}:7: "


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_a_number_however_it_is_written(number: float) -> None:
    for text in (repr(number), f"{number:e}", json.dumps(number), f"{number:.17E}"):
        value = read_override(f"lr={text}").value
        assert not isinstance(value, str)
        assert value == float(text)
    assert read_override(f"x=[{number!r}, {{a: {number!r}}}]").value == [number, {"a": number}]


@pytest.mark.parametrize("text", ["6e-4x", "e5", "1e", "v1e5", "2026-01-31", "1.2.3"])
def test_what_is_not_a_number_stays_text(text: str) -> None:
    assert read_override(f"wandb_run_name={text}").value == text


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("seed: 1\nseed: 2\n", 2, "seed is given twice, first on line 1"),
        ("train-iters: 1\n\ntrain_iters: 1\n", 3, "- and _ are the same"),
        ("optimizer:\n  params:\n    lr: 1\n    lr: 2\n", 4, "lr is given twice"),
        ("seed: 1\n  x: [\n", 2, "not YAML"),
        ("seed: 'open\n", 2, "not YAML"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        read_file(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just words\n", "1: 2\n"])
def test_a_file_that_is_no_map_of_names(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.yml"):
        read_file(write(tmp_path, text))


def test_an_empty_file_has_no_keys(tmp_path: Path) -> None:
    assert read_file(write(tmp_path, "# nothing\n")) == []


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yml: No such file"):
        read_file(tmp_path / "nowhere.yml")
    (tmp_path / "binary.yml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        read_file(tmp_path / "binary.yml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_file(tmp_path)


@pytest.mark.parametrize("word", ["seed", "=1", "seed=[1"])
def test_words_that_set_nothing(word: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        read_override(word)
