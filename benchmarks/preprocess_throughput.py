"""Preprocessing from command to finished files, against two yardsticks, with GPT-2's tokenizer on real text.

1. gigatoken's own ``encode_batch`` on the same documents already in memory: no reading, parsing or writing.
   All documents in one call, as its users do; and in calls of 1,000, where memory is used again.
2. The straightforward scheme of Megatron-LM and GPT-NeoX: a process pool, one ``encode`` of the tokenizers
   library for each document, lists of ids pickled to the parent, who alone writes. On the first
   ``--slow-megabytes``.

Each is measured in a process of its own. CPU time tells the same where other programs disturb the wall clock.
The text: the standard library's source again and again, with the JSON lines in
``$MEGATRON_LITE_TEST_DATA/text``, cut into documents at other places each time.

    python benchmarks/preprocess_throughput.py --vocab-file vocab.json --merge-file merges.txt
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orjson
import psutil

from megatron_lite.data.embedded import read_standard_library
from megatron_lite.data.preprocessing.encode import TokenizerSource
from megatron_lite.data.tokenizers import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def write_corpus(path: Path, size: int) -> None:
    """JSON lines of about ``size`` bytes with the key ``text``."""
    generator = random.Random(1)
    sources = [source.decode() for source in read_standard_library()]
    real = os.environ.get("MEGATRON_LITE_TEST_DATA")
    for file in sorted(Path(real, "text").glob("*.jsonl")) if real else []:
        sources += [orjson.loads(line)["text"] for line in file.read_bytes().splitlines()]
    written = 0
    with open(path, "wb") as output:
        while written < size:
            generator.shuffle(sources)
            cut = generator.randint(2000, 6000)
            for source in sources:
                for start in range(0, len(source), cut):
                    written += output.write(orjson.dumps({"text": source[start : start + cut]}) + b"\n")
                if written >= size:
                    break


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def in_memory(tokenizer: Tokenizer, path: Path, batch: int | None) -> tuple[int, float, float]:
    """Tokens, seconds and CPU seconds of gigatoken's encode_batch."""
    import awkward
    import gigatoken

    documents = [orjson.loads(line)["text"] for line in path.read_bytes().splitlines()]
    fast = gigatoken.Tokenizer(tokenizer.library)  # type: ignore[attr-defined]
    batch = batch or len(documents)
    start, cpu = time.perf_counter(), cpu_seconds()
    tokens = sum(
        int(awkward.num(fast.encode_batch(documents[first : first + batch]), axis=1).to_numpy().sum())
        for first in range(0, len(documents), batch)
    )
    return tokens, time.perf_counter() - start, cpu_seconds() - cpu


def straightforward(source: TokenizerSource, path: Path, size: int, workers: int) -> tuple[int, float, float]:
    """Tokens, seconds and CPU seconds of one encode a document in a pool, a single writer."""
    with open(path, "rb") as input_file:
        lines = input_file.readlines(size)
    start, cpu = time.perf_counter(), cpu_seconds()
    tokens = 0
    with (
        multiprocessing.Pool(workers, start_worker, (source,)) as pool,
        open(path.with_name("straightforward.bin"), "wb") as file,
    ):
        for ids in pool.imap(encode_one, lines, 25):
            file.write(np.array(ids, np.uint16).tobytes(order="C"))
            tokens += len(ids)
        pool.close()
        pool.join()
    return tokens, time.perf_counter() - start, cpu_seconds() - cpu


def start_worker(source: TokenizerSource) -> None:
    global worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    worker_tokenizer = load_tokenizer(source)


def encode_one(line: bytes) -> list[int]:
    return [*worker_tokenizer.encode(json.loads(line)["text"]), worker_tokenizer.eod_id]


def end_to_end(
    source: TokenizerSource, path: Path, workers: int, memory: bool = False
) -> tuple[int, float, float, float]:
    """Tokens, seconds, CPU seconds, peak MiB (if ``memory``, which slows it) of tools/preprocess_data.py."""
    prefix = path.with_name("out")
    for file in path.parent.glob("out_*"):
        file.unlink()
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--append-eod"]
    command += ["--vocab-file", str(source.vocab_file), "--merge-file", str(source.merge_file)]
    command += ["--output-prefix", str(prefix), "--workers", str(workers)]
    start, cpu = time.perf_counter(), cpu_seconds()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        peak = max(resident(process), default=0.0) if memory else 0.0
        status = process.wait()
    seconds = time.perf_counter() - start
    assert status == 0, "preprocessing failed"
    facts = json.loads(path.with_name("out_text_document.json").read_text())
    return facts["tokens"], seconds, cpu_seconds() - cpu, peak


def resident(process: subprocess.Popen[bytes]) -> Iterator[float]:
    """MiB of memory of ``process`` and its children, shared pages counted once, every 20 ms until it ends."""
    tree = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            processes = [tree, *tree.children(recursive=True)]
            yield sum(each.memory_full_info().pss for each in processes) / 2**20
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            pass
        time.sleep(0.02)


def run_part(arguments: argparse.Namespace, part: str) -> tuple[int, float, float]:
    """One measurement in a new process: (tokens, seconds, CPU seconds)."""
    words = [*sys.argv[1:], "--corpus", str(arguments.corpus), "--part", part]
    result = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=True)
    tokens, seconds, cpu = result.stdout.split()
    return int(tokens), float(seconds), float(cpu)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocab-file", required=True, help="GPT-2's vocab.json")
    parser.add_argument("--merge-file", required=True, help="GPT-2's merges.txt")
    parser.add_argument("--megabytes", type=int, default=210)
    parser.add_argument("--slow-megabytes", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    source = TokenizerSource("GPT2BPETokenizer", arguments.vocab_file, arguments.merge_file)
    if arguments.part == "straightforward":
        size = arguments.slow_megabytes * 10**6
        print(*straightforward(source, arguments.corpus, size, arguments.workers))
    elif arguments.part:
        batch = None if arguments.part == "one call" else 1000
        print(*in_memory(load_tokenizer(source), arguments.corpus, batch))
    else:
        with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
            arguments.corpus = Path(folder, "corpus.jsonl")
            write_corpus(arguments.corpus, arguments.megabytes * 10**6)
            measure_all(arguments, source)


def measure_all(arguments: argparse.Namespace, source: TokenizerSource) -> None:
    megabytes = arguments.corpus.stat().st_size / 1e6
    runs = {
        "encode_batch, one call": lambda: run_part(arguments, "one call"),
        "encode_batch, calls of 1,000": lambda: run_part(arguments, "calls"),
        "straightforward scheme": lambda: run_part(arguments, "straightforward"),
        "preprocess_data.py": lambda: end_to_end(source, arguments.corpus, arguments.workers)[:3],
    }
    print(f"{megabytes:.0f} MB of JSON lines, {arguments.workers} workers, median of {arguments.repeats}")
    rates, costs = {}, {}
    for name, run in runs.items():
        results = [run() for _ in range(arguments.repeats)]
        tokens = results[0][0]
        seconds, cpu = (statistics.median(result[column] for result in results) for column in (1, 2))
        rates[name], costs[name] = tokens / seconds, cpu / tokens
        print(
            f"{name:30} {seconds:7.2f} s {rates[name] / 1e6:8.2f} M tokens/s "
            f"{tokens / cpu / 1e6:8.2f} M tokens per CPU second"
        )
    ours = rates.pop("preprocess_data.py")
    for name, rate in rates.items():
        by_cpu = costs[name] / costs["preprocess_data.py"]
        print(f"preprocess_data.py / {name:30} {ours / rate:6.2f} (by CPU time {by_cpu:.2f})")
    peak = end_to_end(source, arguments.corpus, arguments.workers, memory=True)[3]
    print(f"peak memory of preprocess_data.py and its workers: {peak:.0f} MiB")


if __name__ == "__main__":
    main()
