"""Token files read from a web server on this machine: a good one, and those that are not."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megatron_lite.config import config_from_keys
from megatron_lite.data import remote
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.remote import BLOCK_BYTES, RemoteDataset
from megatron_lite.utils.errors import DataError

pytest.importorskip("aiohttp", reason="fsspec reads http by aiohttp, which is not installed")

LIMIT = 100 * BLOCK_BYTES


@dataclass
class Web:
    """What the server has and how it behaves.

    Attributes:
        files: path → content.
        date: of all files.
        ranges: whether it gives parts of files.
        dropped: answers of GET that break off in the middle before all goes well.
        failing: answers of 503 before all goes well.
        asked: (path, range) of each GET.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    date: str = "Mon, 01 Jan 2024 00:00:00 GMT"
    ranges: bool = True
    dropped: int = 0
    failing: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""


def handler_of(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(send=False)

        def do_GET(self) -> None:
            self.answer(send=True)

        def answer(self, send: bool) -> None:
            content = web.files.get(self.path)
            wanted = self.headers.get("Range", "")
            with web.lock:
                web.asked += [(self.path, wanted)] if send else []
                fails, drops = web.failing > 0, send and web.dropped > 0
                web.failing -= fails
                web.dropped -= drops
            if content is None or fails:
                self.send_error(503 if fails else 404)
                return
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) if web.ranges else None
            part = content[int(match[1]) : int(match[2]) + 1] if match else content
            self.send_response(206 if match else 200)
            if match:
                self.send_header("Content-Range", f"bytes {match[1]}-{match[2]}/{len(content)}")
            self.send_header("Last-Modified", web.date)
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if send:
                with suppress(ConnectionError):  # who asked for a part hangs up when all of it comes
                    self.wfile.write(part[: len(part) // 2] if drops else part)
                self.close_connection = drops

        def log_message(self, *_: object) -> None:
            """Nothing is printed."""

    return Handler


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Clients hang up: nothing is printed. What matters the client's side tells."""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    web = Web()
    monkeypatch.setattr(remote.time, "sleep", lambda _seconds: None)  # between attempts
    with Server(("127.0.0.1", 0), handler_of(web)) as server:
        web.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield web
        server.shutdown()
        thread.join()


def publish(web: Web, folder: Path, seed: int = 0) -> IndexedDataset:
    """A corpus of 3 MB, here and on the server."""
    with IndexedWriter(folder / "a", np.dtype("<u2")) as writer:
        tokens = np.random.default_rng(seed).integers(0, 50_000, (150, 10_000))
        writer.add_many(tokens.reshape(-1), np.full(150, 10_000))
    for ending in ("bin", "idx"):
        web.files[f"/a.{ending}"] = (folder / f"a.{ending}").read_bytes()
    return IndexedDataset(folder / "a")


def test_samples_are_equal_and_the_file_is_fetched_once(web: Web, tmp_path: Path) -> None:
    publish(web, tmp_path)

    def samples(path: str) -> list[list[int]]:
        keys = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "seq_length": 512}
        paths = {"data_path": path, "data_cache_dir": str(tmp_path / "cache"), "split": "1"}
        dataset = open_datasets(config_from_keys({**keys, **paths, "vocab_size": 60_000})).train
        return [np.asarray(dataset[number]).tolist() for number in range(200)]

    assert samples(f"{web.url}/a") == samples(str(tmp_path / "a"))
    blocks = [wanted for path, wanted in web.asked if path == "/a.bin"]
    assert len(blocks) == len(set(blocks)) == 1 + 3, "the probe, and each block once, whoever wanted it"


def test_blocks_are_fetched_ahead_of_need(web: Web, tmp_path: Path) -> None:
    local = publish(web, tmp_path)
    far = RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)
    far.will_read(0, BLOCK_BYTES)
    far._blocks.fetch(range(2))  # waits for those under way
    web.files.clear()
    assert np.array_equal(far.tokens[5:BLOCK_BYTES], local.tokens[5:BLOCK_BYTES])


def test_a_server_that_gives_no_parts_is_told_from_a_good_one(web: Web, tmp_path: Path) -> None:
    publish(web, tmp_path)
    web.ranges = False
    with pytest.raises(DataError, match=r"the server of http://.*/a\.bin does not give parts of files"):
        RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)
    assert len([path for path, _ in web.asked if path == "/a.bin"]) == 1, "it is asked once"


def test_what_is_not_there_is_named_at_once(web: Web, tmp_path: Path) -> None:
    publish(web, tmp_path)
    with pytest.raises(DataError, match=rf"there is no file {web.url}/b\.idx"):
        RemoteDataset(f"{web.url}/b", tmp_path / "cache", LIMIT)
    assert len(web.asked) == 1
    far = RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)
    web.files.clear()
    with pytest.raises(DataError, match=rf"there is no file {web.url}/a\.bin"):
        far.document(0)


def test_failures_are_ridden_out(web: Web, tmp_path: Path) -> None:
    local = publish(web, tmp_path)
    web.failing = 3  # HEAD and GET of the first attempt, HEAD of the second
    far = RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)
    for web.dropped, web.failing in ((3, 0), (0, 3), (0, 0)):
        far._blocks.fetch([0 if web.dropped else 1 if web.failing else 2])
        assert web.dropped == web.failing == 0
    assert np.array_equal(far.tokens[:], local.tokens)
    web.failing = 10**6
    with pytest.raises(DataError, match=r"a\.idx cannot be read: 503"):
        RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)


def test_a_changed_date_is_noticed(web: Web, tmp_path: Path) -> None:
    for seed, day in ((0, "01"), (1, "02")):
        local = publish(web, tmp_path, seed)  # of the same size
        web.date = f"Mon, {day} Jan 2024 00:00:00 GMT"
        far = RemoteDataset(f"{web.url}/a", tmp_path / "cache", LIMIT)
        assert np.array_equal(far.tokens[:], local.tokens)


FILL = """
import os, signal, sys
from pathlib import Path
import xxhash
from megatron_lite.data.remote import RemoteDataset

url, cache, killed = sys.argv[1:]
far = RemoteDataset(url, Path(cache), 1 << 30)
if killed:
    write = Path.write_bytes

    def write_half(path, content):
        write(path, content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    Path.write_bytes = write_half
print(xxhash.xxh3_64(far.tokens[:].tobytes()).hexdigest())
"""
"""Reads all tokens through the cache and prints their digest; or dies with a block half written."""


def fill(url: str, cache: Path, killed: bool = False) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", FILL, url, str(cache), "killed" if killed else ""]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_processes_share_a_cache_also_with_one_that_was_killed(web: Web, tmp_path: Path) -> None:
    local = publish(web, tmp_path)
    cache, url = tmp_path / "cache", f"{web.url}/a"
    with fill(url, cache, killed=True) as process:
        assert process.wait(300) == -signal.SIGKILL
    assert list(cache.glob("*/blocks/.*.tmp")), "it died in the middle"
    assert not list(cache.glob("*/blocks/0*"))
    with fill(url, cache) as first, fill(url, cache) as second:
        found = [process.communicate(timeout=300)[0].strip() for process in (first, second)]
    assert found == [xxhash.xxh3_64(local.tokens.tobytes()).hexdigest()] * 2
    next(iter(cache.glob("*/blocks/0*"))).write_bytes(b"")  # as a power cut may leave it
    assert np.array_equal(RemoteDataset(url, cache, LIMIT).tokens[:], local.tokens)
