"""What preprocessing promises besides speed, on large inputs, with GPT-2's tokenizer.

- equal: the ids in the files are the tokenizers library's own, for every document of 50 MB of English,
  Chinese and code, with emoji and broken UTF-8 sprinkled in.
- memory: the peak of all processes together, for a corpus with one document of 100 MB.
- vocabulary: the time to train a byte-level BPE of 32,000 ids on 100 MB.

    python benchmarks/preprocess_checks.py --vocab-file vocab.json --merge-file merges.txt
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from preprocess_throughput import ROOT, resident, write_corpus

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer

SPRINKLES = [
    "\U0001f600\U0001f469\u200d\U0001f4bb".encode(),
    "e\u0301\u00a0\u3000\u2028 \t  \r\n".replace("\n", "\\n")
    .replace("\r", "\\r")
    .replace("\t", "\\t")
    .encode(),
    b"<|endoftext|>",
    b"\xff\xfe",
    b"\xf0\x9f\x98",
    b"\xed\xa0\x80",
]
"""What is put into every few hundred bytes; the last three are not UTF-8."""


def sprinkle(source: Path, target: Path) -> None:
    """The JSON lines of ``source`` with SPRINKLES after some of the spaces inside of texts."""
    generator = random.Random(2)
    with open(source, "rb") as lines, open(target, "wb") as output:
        for line in lines:
            head, text = line[:9], line[9:]
            words = text.split(b" ")
            for index in range(generator.randrange(50), len(words) - 1, 50):
                words[index] += generator.choice(SPRINKLES)
            output.write(head + b" ".join(words))


def preprocess(arguments: argparse.Namespace, corpus: Path, *options: str) -> tuple[Path, float, float]:
    """Run the tool: prefix, seconds, peak MiB."""
    prefix = corpus.with_suffix("")
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus), *options]
    command += ["--vocab-file", arguments.vocab_file, "--merge-file", arguments.merge_file]
    command += ["--output-prefix", str(prefix), "--workers", "2"]
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        peak = max(resident(process), default=0.0)
        assert process.wait() == 0, "preprocessing failed"
    return Path(f"{prefix}_text_document"), time.perf_counter() - start, peak


def check_equal(arguments: argparse.Namespace, tokenizer: Tokenizer, folder: Path) -> None:
    write_corpus(folder / "plain.jsonl", arguments.megabytes * 10**6)
    sprinkle(folder / "plain.jsonl", folder / "equal.jsonl")
    prefix, _, _ = preprocess(arguments, folder / "equal.jsonl", "--invalid-utf8", "replace")
    dataset = IndexedDataset(prefix)
    lines = (folder / "equal.jsonl").read_bytes().splitlines()
    texts = [json.loads(line.decode(errors="replace"))["text"] for line in lines]
    assert len(texts) == dataset.document_count
    different = 0
    for first in range(0, len(texts), 1000):
        for index, ids in enumerate(tokenizer.encode_batch(texts[first : first + 1000]), first):
            different += dataset.document(index).tolist() != ids
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"equal: {different} of {len(texts):,} documents ({size:.0f} MB) differ from the tokenizers library"
    )


def check_memory(arguments: argparse.Namespace, folder: Path) -> None:
    write_corpus(folder / "memory.jsonl", 100 * 10**6)
    source = (folder / "memory.jsonl").read_bytes()
    text = b"".join(json.loads(line)["text"].encode() for line in source.splitlines())[: 100 * 10**6]
    with open(folder / "memory.jsonl", "ab") as file:
        file.write(json.dumps({"text": text.decode(errors="ignore")}).encode() + b"\n" + source)
    _, seconds, peak = preprocess(arguments, folder / "memory.jsonl")
    print(f"memory: {peak:.0f} MiB at most, one document of 100 MB among 200 MB of others, {seconds:.1f} s")


def check_vocabulary(folder: Path) -> None:
    write_corpus(folder / "vocabulary.jsonl", 100 * 10**6)
    command = [
        sys.executable,
        str(ROOT / "tools/train_tokenizer.py"),
        "--input",
        str(folder / "vocabulary.jsonl"),
    ]
    command += ["--vocab-size", "32000", "--output", str(folder / "tokenizer.json")]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"vocabulary: {time.perf_counter() - start:.1f} s for 32,000 ids from 100 MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges.txt")
    parser.add_argument("--megabytes", type=int, default=50, help="of text compared")
    arguments = parser.parse_args()
    source = TokenizerSource("GPT2BPETokenizer", arguments.vocab_file, arguments.merge_file)
    with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
        check_equal(arguments, load_tokenizer(source), Path(folder))
        check_memory(arguments, Path(folder))
        check_vocabulary(Path(folder))


if __name__ == "__main__":
    main()
