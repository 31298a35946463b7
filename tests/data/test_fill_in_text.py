"""Fill-in-the-middle that cuts text: what is put back is the text, and cuts fall inside of tokens."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_lite.config import config_from_keys
from megatron_lite.data.cuts import TextCut, TokenCut
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.fill_in import FillIn
from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.tokenizers.byte_level import load_bytes
from megatron_lite.data.tokenizers.huggingface import HFTokenizer

SENTINELS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("def (x):\n  return"), max_size=80)


@pytest.fixture(scope="module")
def tokenizer(bpe_file: Path) -> HFTokenizer:
    library = tokenizers.Tokenizer.from_file(str(bpe_file))
    library.add_special_tokens([*SENTINELS, "<|file|>"])
    return HFTokenizer(library, "<|endoftext|>")


def sentinels(tokenizer: HFTokenizer) -> list[int]:
    return [tokenizer.library.token_to_id(token) for token in SENTINELS]


def fill_in(tokenizer: HFTokenizer, left_alone: str | None = None, **more: object) -> FillIn:
    prefix, suffix, middle = sentinels(tokenizer)
    values = {"rate": 1.0, "spm_rate": 0.5, "cut": TextCut(tokenizer, left_alone), **more}
    return FillIn(prefix=prefix, suffix=suffix, middle=middle, eod_id=tokenizer.eod_id, **values)  # type: ignore[arg-type]


def put_back(text: str) -> str:
    """The document of which ``text``, decoded with its sentinels, was made; by the paper's two forms."""
    empty, rest = text.split(SENTINELS[0])
    assert not empty
    before, rest = rest.split(SENTINELS[1])
    after, middle = rest.split(SENTINELS[2])
    return before + middle + after


@settings(deadline=None)
@given(text=TEXTS, seed=st.integers(0, 2**32), spm=st.booleans())
def test_the_pieces_in_order_are_the_text(tokenizer: HFTokenizer, text: str, seed: int, spm: bool) -> None:
    ids = np.array(tokenizer.encode(text), np.int64)
    change = fill_in(tokenizer, spm_rate=float(spm))
    found = change.rearranged(ids, np.random.default_rng(seed))
    if not text:
        assert not len(found)
        return
    assert found.dtype == np.int64
    assert put_back(tokenizer.decode(found.tolist())) == text
    again = change.rearranged(ids, np.random.default_rng(seed))
    assert found.tolist() == again.tolist(), "draws are those of the generator alone"


def test_every_place_between_characters_is_as_likely(tokenizer: HFTokenizer) -> None:
    text = "    return sorted(values)"
    ids = np.array(tokenizer.encode(text), np.int64)
    assert len(ids) < len(text), "tokens are longer than a character"
    cut, random = TextCut(tokenizer), np.random.default_rng(0)
    counts = np.zeros(len(text) + 1)
    for _ in range(5000):
        parts = cut(ids, random)
        assert parts is not None
        before, middle, after = (tokenizer.decode(part.tolist()) for part in parts)
        for part, piece in zip(parts, (before, middle, after), strict=True):
            assert part.tolist() == tokenizer.encode(piece), "a part is encoded as if it stood alone"
        counts[len(before)] += 1
        counts[len(before + middle)] += 1
    assert counts == pytest.approx(10_000 / len(counts), rel=0.25)


@settings(deadline=None)
@given(
    texts=st.lists(TEXTS.map(lambda text: text.encode()), min_size=1, max_size=4),
    cut=st.integers(0, 3),
    seed=st.integers(0, 2**32),
)
def test_bytes_that_are_no_text_are_kept(texts: list[bytes], cut: int, seed: int) -> None:
    """Windows begin and end in the middle of characters."""
    window = np.array([*b"\x00".join(texts)[cut:], *b"\xe4\xb8"], np.int64)
    tokenizer = load_bytes(TokenizerSource("ByteTokenizer"))
    change = FillIn(1.0, 0.0, 1000, 1001, 1002, tokenizer.eod_id, cut=TextCut(tokenizer))
    found = change.rearranged(window, np.random.default_rng(seed)).tolist()
    suffix, middle = found.index(1001), found.index(1002)
    assert found[1:suffix] + found[middle + 1 :] + found[suffix + 1 : middle] == window.tolist()


def test_special_tokens_stay_whole_and_prefixes_leave_alone(tokenizer: HFTokenizer) -> None:
    ids = np.array(tokenizer.encode("def f():<|file|>\n    return 1"), np.int64)
    special = tokenizer.library.token_to_id("<|file|>")
    random = np.random.default_rng(3)
    change = fill_in(tokenizer)
    for _ in range(200):
        assert change.rearranged(ids, random).tolist().count(special) == 1
    left = fill_in(tokenizer, "def f", separator=special, fragment_rate=1.0)
    window = np.array([*ids, *[tokenizer.eod_id] * 20], np.int64)
    found = tokenizer.decode(left(window, random).tolist()).removesuffix("<|endoftext|>" * 5)
    first, second = found[: found.index("<|end")].split("<|file|>")
    assert first == "def f():"
    assert put_back(second) == "\n    return 1"


def test_ids_that_the_tokenizer_does_not_know_are_cut_between_tokens(tokenizer: HFTokenizer) -> None:
    ids = np.array([5, tokenizer.vocab_size + 3, 7], np.int64)
    found = fill_in(tokenizer).rearranged(ids, np.random.default_rng(1))
    assert sorted(found.tolist()) == sorted([*ids.tolist(), *sentinels(tokenizer)])


def test_a_tokenizer_that_adds_spaces_is_cut_between_tokens() -> None:
    """Llama's kind: "a" alone becomes "▁a", which is " a" behind other text."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    library.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    text = "def parse(self, text): return text"
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<|endoftext|>"], show_progress=False)
    library.train_from_iterator([text * 3], trainer)
    tokenizer = HFTokenizer(library, "<|endoftext|>")
    ids = np.array(tokenizer.encode(text), np.int64)
    assert tokenizer.decode(ids.tolist()) == text
    for seed in range(50):
        parts = TextCut(tokenizer)(ids, np.random.default_rng(seed))
        assert parts is not None
        assert tokenizer.decode(np.concatenate(parts).tolist()) == text


def test_a_shorter_text_is_filled_up(tokenizer: HFTokenizer) -> None:
    single = [tokenizer.encode(letter)[0] for letter in "return return return"]
    window = np.array(single, np.int64)
    assert len(tokenizer.encode("return return return")) + 9 < len(window)
    found = fill_in(tokenizer, padding=7)(window, np.random.default_rng(0)).tolist()
    assert len(found) == len(window)
    text = found[: found.index(7)]
    assert found[len(text) :] == [7] * (len(window) - len(text))
    assert put_back(tokenizer.decode(text)) == "return return return"


def test_keys_of_megatron_and_bigcode(
    tokenizer: HFTokenizer, source_texts: list[str], tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    with IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
        for text in source_texts:
            writer.add([*tokenizer.encode(text), tokenizer.eod_id])

    def samples(**keys: object) -> list[str]:
        shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 256, "split": "1"}
        paths = {
            "data_path": str(tmp_path / "a"),
            "vocab_file": str(tmp_path),
            "tokenizer_type": "HFTokenizer",
        }
        config = config_from_keys({**shape, **paths, "vocab_size": tokenizer.vocab_size, **keys})
        train = open_datasets(config).train
        return [tokenizer.decode(np.asarray(train[number]).tolist()) for number in range(30)]

    plain = samples()
    changed = samples(fim_rate=1, fim_data=True, fim_eod_token="<|endoftext|>", fim_pad_token="<|endoftext|>")
    assert changed != plain
    compared = 0
    for before, after in zip(plain, changed, strict=True):
        if "<|endoftext|>" not in before and SENTINELS[2] in after:  # one document; its middle's end fell off
            prefix, suffix, middle = re.split(r"<\|fim_\w+\|>", after)[1:]
            assert before.startswith(prefix + middle)
            assert before.endswith(suffix)
            compared += 1
    assert compared > 10
    megatron = samples(fim_rate=1, fim_split_sample="<|file|>", fim_fragment_rate=0.1, fim_no_prefix='"""')
    assert megatron == samples(
        fim_rate=1, fim_split_sample="<|file|>", fragment_fim_rate=0.1, no_fim_prefix='"""'
    )


def test_token_cuts_fall_anywhere() -> None:
    random = np.random.default_rng(0)
    lengths = {tuple(map(len, TokenCut()(np.arange(3), random) or ())) for _ in range(300)}
    assert lengths == {(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)}
