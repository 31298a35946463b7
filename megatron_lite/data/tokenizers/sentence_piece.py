"""Tokenizers of the sentencepiece library."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2

from megatron_lite.data.tokenizers.base import END_OF_TEXT, Tokenizer, TokenizerKeys, read_vocabulary_file
from megatron_lite.data.tokenizers.export import save_equal_library
from megatron_lite.utils.errors import DataError

END_PIECES = (END_OF_TEXT, "<eod>")
"""Pieces that end a document, CPM's among them; a model without them has ``</s>`` for it."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model.

    Args:
        processor: the loaded model.
        eod_id: the id that ends a document.
    """

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, eod_id: int) -> None:
        self.processor = processor
        self.eod_id = eod_id
        self.vocab_size = processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """The library's ids, without beginning and end."""
        return self.processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same for many texts."""
        return self.processor.encode(list(texts))

    def decode(self, ids: Sequence[int]) -> str:
        """The library's text."""
        return self.processor.decode(list(ids))

    def content(self) -> bytes:
        """The model file."""
        return self.processor.serialized_model_proto()

    def token_bytes(self) -> np.ndarray:
        """From each piece's spelling; unknown and control pieces count 0. int64 [vocab_size].

        The space that the model may put before a text counts, so a text may count one byte more than it has.
        """
        lengths = np.zeros(self.vocab_size, np.int64)
        for index in range(self.vocab_size):
            if self.processor.is_byte(index):
                lengths[index] = 1
            elif not (self.processor.is_control(index) or self.processor.is_unknown(index)):
                lengths[index] = len(self.processor.id_to_piece(index).replace("▁", " ").encode())
        return lengths

    def save_pretrained(self, folder: Path) -> None:
        """Write it as a model of the tokenizers library, after a check that the ids are the same."""
        library = imitation(self.processor)
        eod_token = self.processor.id_to_piece(self.eod_id)
        save_equal_library(self, library, folder, eod_token)


def imitation(processor: sentencepiece.SentencePieceProcessor) -> tokenizers.Tokenizer:
    """The tokenizers library's nearest equivalent of a sentencepiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(processor.serialized_model_proto())
    scores = {piece.piece: piece.score for piece in proto.pieces}
    model: tokenizers.models.Model
    if proto.trainer_spec.model_type == proto.trainer_spec.UNIGRAM:
        model = tokenizers.models.Unigram(
            list(scores.items()), unk_id=processor.unk_id(), byte_fallback=proto.trainer_spec.byte_fallback
        )
    else:
        model = tokenizers.models.BPE(
            vocab={piece: index for index, piece in enumerate(scores)},
            merges=merges_by_score(scores),
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    library = tokenizers.Tokenizer(model)
    library.normalizer = normalizer(proto.normalizer_spec)
    decoders = [
        tokenizers.decoders.Replace("▁", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        decoders.append(tokenizers.decoders.Strip(" ", 1, 0))
    library.decoder = tokenizers.decoders.Sequence(decoders)
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    library.add_special_tokens([piece.piece for piece in proto.pieces if piece.type == kinds.CONTROL])
    library.add_tokens([piece.piece for piece in proto.pieces if piece.type == kinds.USER_DEFINED])
    return library


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, best score of the whole first."""
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                merges.append((score, piece[:cut], piece[cut:]))
    merges.sort(key=lambda merge: -merge[0])
    return [(left, right) for _, left, right in merges]


def normalizer(spec: sentencepiece_model_pb2.NormalizerSpec) -> tokenizers.normalizers.Normalizer:
    """What the model does to text before it cuts it."""
    steps: list[tokenizers.normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(tokenizers.normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(tokenizers.normalizers.Strip())
        steps.append(tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(tokenizers.normalizers.Prepend("▁"))
    steps.append(tokenizers.normalizers.Replace(" ", "▁"))
    return tokenizers.normalizers.Sequence(steps)


def load_sentencepiece(keys: TokenizerKeys) -> Tokenizer:
    """``SPMTokenizer``: ``vocab_file`` is the model; ``<|endoftext|>``, ``<eod>``, else ``</s>``
    ends a document."""
    path = read_vocabulary_file("SPMTokenizer", "vocab_file", keys.vocab_file)
    processor = read_processor(path)
    return SentencePieceTokenizer(processor, end_id(processor, path))


def read_processor(path: Path) -> sentencepiece.SentencePieceProcessor:
    """The model in ``path``. Raises DataError if it is none."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError):
        raise DataError(f"{path} is not a sentencepiece model: correct vocab_file") from None


def end_id(processor: sentencepiece.SentencePieceProcessor, path: Path) -> int:
    """The id that ends a document. Raises DataError if the model, from ``path``, has none."""
    for piece in END_PIECES:
        if (index := processor.piece_to_id(piece)) != processor.unk_id():
            return index
    if processor.eos_id() < 0:
        raise DataError(f"{path} has neither {END_OF_TEXT} nor an end-of-sentence piece: train one that has")
    return processor.eos_id()
