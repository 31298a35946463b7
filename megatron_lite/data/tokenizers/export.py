"""Writing a tokenizer for transformers when the tokenizers library only imitates it."""

from __future__ import annotations

from pathlib import Path

import tokenizers

from megatron_lite.data.tokenizers.base import Tokenizer, write_tokenizer_config
from megatron_lite.utils.errors import DataError
from megatron_lite.utils.files import atomic_path

PROBES = (
    "The quick brown fox jumps over the lazy dog. It's 3.14159, isn't it? We'll see; THEY'RE gone!",
    "  leading, trailing and  double   spaces  ",
    "line\nbreaks\r\nand\n\n\n  indentation:\n\tdef f(x):\n\t\treturn x ** 2  # 1234567890\n",
    "naïve café Straße ÅNGSTRÖM ﬁ ½ Ⅷ e\u0301 \u00a0 non-breaking\u3000ideographic",
    "臨淮自古多名勝,解剪尊前聽不窮。日本語のテキスト 한국어 Русский текст العربية हिन्दी",
    "🙂 👩‍👩‍👧‍👦 🏳️‍🌈 𝕏 ∑∫√ → ≤ … — “quotes” ‘single’ {}[]<>|\\/@#$%^&*_+=~`",  # noqa: RUF001
    "https://example.org/a?b=c&d=%20 user@example.org 1,000,000 0x1F 192.168.0.1",
)
"""Text of many kinds on which an imitation must give the same ids."""


def save_equal_library(
    tokenizer: Tokenizer, library: tokenizers.Tokenizer, folder: Path, eod_token: str
) -> None:
    """Write ``library`` and its configuration into ``folder`` if it gives ``tokenizer``'s ids on the probes.

    Raises:
        DataError: it does not.
    """
    for probe in PROBES:
        if library.encode(probe).ids != tokenizer.encode(probe):
            raise DataError(
                f"this {type(tokenizer).__name__} cannot be written as a tokenizer.json: it would give "
                f"other ids, for example for {probe[:20]!r}; copy the vocabulary file itself beside the "
                "exported weights"
            )
    with atomic_path(folder / "tokenizer.json") as temporary:
        library.save(str(temporary))
    write_tokenizer_config(folder, eod_token)
