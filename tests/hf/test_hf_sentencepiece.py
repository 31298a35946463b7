"""A folder with a tokenizer.model alone: its ids are transformers', with the token that begins a text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from tiny_folders import make_folder
from transformers import AutoTokenizer, LlamaTokenizer

from megatron_lite.generation import load_model
from megatron_lite.hf import export_folder, import_folder
from megatron_lite.utils.errors import DataError

TEXTS = ["the sea and the sand", "a  sad   tale\n\tended", "漢字 🙂 naïve", "12 dead seals.", ""]


def make_llama(folder: Path, **config: Any) -> None:
    """A Llama folder whose only tokenizer is a sentencepiece model, trained as Llama's was."""
    make_folder(folder, "llama", vocab_size=400)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    draw = random.Random(0)
    syllables = [first + second + last for first in "tsdln" for second in "aei" for last in ("", "n", "d")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(300)]
    with open(folder / "tokenizer.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(" ".join(draw.choices(words, k=8)) for _ in range(300)),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )


@pytest.mark.parametrize("adds", [True, False, None])
def test_ids_are_those_of_transformers(tmp_path: Path, adds: bool | None) -> None:
    config = {} if adds is None else {"add_bos_token": adds}
    named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ 1 }}"}
    make_llama(tmp_path / "theirs", tokenizer_class="LlamaTokenizer", **named, **config)
    theirs = LlamaTokenizer.from_pretrained(tmp_path / "theirs")
    keys = import_folder(tmp_path / "theirs", tmp_path / "ours").data
    ours = load_model(tmp_path / "ours", torch.device("cpu")).tokenizer
    assert keys.tokenizer_type == ("HFTokenizer" if adds else "SPMTokenizer")
    assert (ours.eod_id, ours.vocab_size) == (2, 400)
    export_folder(tmp_path / "ours", tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        assert ids == again(text).input_ids
        assert ids[:1] == [1] or not adds
    assert adds or ours.decode(ours.encode(TEXTS[2])) == TEXTS[2]


def test_a_beginning_that_is_no_token_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "theirs", add_bos_token=True, bos_token="<bos>")
    with pytest.raises(DataError, match=r"has no <bos>"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_an_end_after_every_text_is_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "theirs", add_eos_token=True)
    with pytest.raises(DataError, match=r"put its tokenizer.json there"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
