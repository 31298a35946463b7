"""One checkpoint, and libraries that do not look into the network."""

from __future__ import annotations

from pathlib import Path

import pytest
from generation.tiny_runs import NEOX, make_checkpoint

from megatron_lite.evaluation.tasks import stay_offline

stay_offline()  # before any test imports lm_eval


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "checkpoints"
    make_checkpoint(folder, **NEOX)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``datasets`` makes of files stays in the tests' folder."""
    import datasets

    folder = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
