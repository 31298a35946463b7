"""Token files read from S3: moto's server on this machine.

Not among the pinned packages, since botocore asks for an older python-dateutil than they have:
``pip install s3fs moto flask flask-cors py-partiql-parser``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from megatron_lite.data.indexed import IndexedDataset, IndexedWriter
from megatron_lite.data.remote import BLOCK_BYTES, RemoteDataset
from megatron_lite.utils.errors import DataError

pytest.importorskip("s3fs", reason="s3fs, by which fsspec reads S3, is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto, which stands for S3, is not installed")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    facts = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in {**facts, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    files.mkdir("bucket")
    yield files
    server.stop()


def test_s3_gives_the_same_tokens_and_tells_a_new_version(
    store: fsspec.AbstractFileSystem, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for seed in (0, 1):
        with IndexedWriter(tmp_path / "a", np.dtype("<u2")) as writer:
            tokens = np.random.default_rng(seed).integers(0, 50_000, 1_500_000)
            writer.add_many(tokens, np.full(150, 10_000))
        for ending in ("bin", "idx"):
            store.pipe(f"bucket/a.{ending}", (tmp_path / f"a.{ending}").read_bytes())
        type(store).clear_instance_cache()  # as a new run has it
        far = RemoteDataset("s3://bucket/a", cache, 100 * BLOCK_BYTES)
        far.will_read(0, BLOCK_BYTES)
        assert np.array_equal(far.tokens[:], IndexedDataset(tmp_path / "a").tokens)
    with pytest.raises(DataError, match=r"there is no file s3://bucket/b\.idx"):
        RemoteDataset("s3://bucket/b", cache, BLOCK_BYTES)
