"""What goes wrong is told in one sentence by every rank, and harms nothing that was there."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_ranks
from small_run import Run, make_engine, save, start, train
from stored import stored_tensors

from megatron_lite.checkpoint import find_checkpoint, load_checkpoint, read_weights, verify
from megatron_lite.checkpoint.layouts import layout_of
from megatron_lite.checkpoint.signs import unheard
from megatron_lite.utils.errors import CheckpointError

RUN = Run(1)


def flip_a_byte(checkpoint: Path) -> None:
    path = checkpoint / "optimizer_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "weights_00001.safetensors", 100)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "weights_00000.safetensors").unlink()


def cut_the_index(checkpoint: Path) -> None:
    text = (checkpoint / "index.json").read_text()
    (checkpoint / "index.json").write_text(text[: len(text) // 2])


def change_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        index = json.loads((checkpoint / "index.json").read_text())
        change(index)
        (checkpoint / "index.json").write_text(json.dumps(index))

    return damage


def pieces(index: dict[str, Any]) -> list[Any]:
    return index["parameters"]["embed_in.weight"]["tensors"]["exp_avg"]["pieces"]


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (flip_a_byte, "optimizer_00001.safetensors is corrupt: its checksum is wrong"),
    "truncated": (truncate, "weights_00001.safetensors has 100 bytes and should have"),
    "lost file": (lose_a_file, "weights_00000.safetensors is missing"),
    "cut index": (cut_the_index, "index.json cannot be read"),
    "no index": (lambda c: (c / "index.json").unlink(), "is not a complete checkpoint"),
    "foreign": (
        change_index(lambda i: i.update(format="x")),
        "is not the index of a megatron_lite checkpoint",
    ),
    "newer": (
        change_index(lambda i: i.update(format_version=9)),
        "has format version 9 and this program reads 3",
    ),
    "changed number": (
        change_index(lambda i: i["engine"].update(global_steps=7)),
        "index.json is corrupt or was changed: its checksum is wrong",
    ),
    "no files": (change_index(lambda i: i.pop("files")), "is damaged, or newer than this program"),
    "hole": (change_index(lambda i: pieces(i).pop()), "does not cover exp_avg of embed_in.weight"),
    "overlap": (
        change_index(lambda i: pieces(i).append([0, 0, 3])),
        "does not cover exp_avg of embed_in.weight",
    ),
}


def trained(run: Run, context: Any, folder: Path) -> Path:
    """The checkpoint of ``run`` after a step."""
    engine = make_engine(run)
    train(engine, 0, 1)
    return save(run, engine, context, folder, 1)


def load_everything_wrong(folder: Path) -> dict[str, str]:
    """Tries each damaged copy on one engine; the sentences. The engine is as before at the end."""
    context = start()
    engine = make_engine(RUN)
    train(engine, 0, 1)
    checkpoint = save(RUN, engine, context, folder, 1)
    sentences = {}
    for name, (damage, _) in DAMAGES.items():
        copy = folder / name / "global_step1"
        if context.is_first:
            shutil.copytree(checkpoint, copy)
            (copy.parent / "latest").write_text("global_step1\n")
            damage(copy)
        context.barrier()
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(copy.parent, engine, context)
        sentences[name] = str(caught.value)
    stateless = Run(0, optimizer="sgd-without-momentum")
    of_adafactor, of_sgd, of_stateless = (
        trained(run, context, folder)
        for run in (Run(0, optimizer="adafactor"), Run(0, optimizer="sgd"), stateless)
    )
    for name, path, other in (
        ("optimizer", checkpoint, make_engine(Run(0, optimizer="sgd"))),
        ("no state wanted", checkpoint, make_engine(stateless)),
        ("no state there", of_stateless, make_engine(Run(0))),
        ("no momentum wanted", of_sgd, make_engine(stateless)),
        ("factored", of_adafactor, make_engine(Run(1, optimizer="adafactor"))),
        ("model", checkpoint, make_engine(RUN, width=11)),
    ):
        before = [p.clone() for p in other.module.parameters()]
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(path, other, context)
        sentences[name] = str(caught.value)
        assert all((a == b).all() for a, b in zip(before, other.module.parameters(), strict=True))
    save(RUN, engine, context, folder / "after", 1)
    return sentences


def test_a_wrong_checkpoint_is_told_and_changes_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(load_everything_wrong, 2, tmp_path)
    assert first == second, "every rank says the same"
    for name, (_, expected) in DAMAGES.items():
        assert expected in first[name]
        assert "\n" not in first[name]
    wants = {
        "optimizer": "has the state of the optimizer AdamW, and this run has SGD; use the same optimizer",
        "no state wanted": "has the state of the optimizer AdamW, and this run has SGD",
        "no state there": "has the state of the optimizer SGD, and this run has AdamW",
        "no momentum wanted": "(momentum_buffer, by SGD) than this run's SGD needs (none)",
        "factored": "(col_var, row_var, step, by Adafactor) than this run's Adafactor needs (step, variance)",
        "model": "another model: it has in another shape embed_in.weight (13, 10) instead of (13, 11)",
    }
    for name, expected in wants.items():
        assert expected in first[name]
    before, after = (tmp_path / place / str(RUN) / "global_step1" for place in ("", "after"))
    assert all((tensor == stored_tensors(after)[key]).all() for key, tensor in stored_tensors(before).items())


def test_export_refuses_the_same_damage(tmp_path: Path) -> None:
    run_ranks(save_one, 2, tmp_path)
    for name, (damage, expected) in DAMAGES.items():
        copy = tmp_path / name / "global_step1"
        shutil.copytree(tmp_path / str(RUN) / "global_step1", copy)
        (copy.parent / "latest").write_text("global_step1\n")
        damage(copy)
        with pytest.raises(CheckpointError) as caught:
            verify(copy.parent)
        assert expected in str(caught.value)
        if name not in ("flipped bit",):  # that one is in a file that holds no weights
            with pytest.raises(CheckpointError):
                list(read_weights(copy.parent))


def save_one(folder: Path) -> None:
    context = start()
    engine = make_engine(RUN)
    train(engine, 0, 1)
    save(RUN, engine, context, folder, 1)


def fill_the_disk_of_rank_1(folder: Path) -> tuple[str, list[str], str]:
    """The error when rank 1 alone cannot write, then what is in the folder, and what ``latest`` says."""
    context = start()
    engine = make_engine(RUN)
    train(engine, 0, 1)
    save(RUN, engine, context, folder, 1)
    if dist.get_rank() == 1:
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, unlimited[1]))
    with pytest.raises(CheckpointError) as caught:
        save(RUN, engine, context, folder, 2, keep_last=1)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    context.barrier()
    place = folder / str(RUN)
    names = sorted(path.name for path in place.iterdir())
    latest = (place / "latest").read_text()
    context.barrier()
    save(RUN, engine, context, folder, 2, keep_last=1)  # there is room again
    verify(place)
    return str(caught.value), names, latest


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(fill_the_disk_of_rank_1, 2, tmp_path)
    assert first == second
    sentence, names, latest = first
    assert sentence.endswith("optimizer_00001.safetensors cannot be written: File too large (rank 1)")
    assert names == ["global_step1", "latest"]
    assert latest == "global_step1\n"
    assert [path.name for path in sorted((tmp_path / str(RUN)).iterdir())] == ["global_step2", "latest"]


def save_often(folder: Path) -> list[list[str]]:
    """The folder after each of several saves that keep two, with the leftovers of a killed run in it."""
    context = start()
    engine = make_engine(RUN)
    place = folder / str(RUN)
    if context.is_first:
        (place / ".tmp-global_step77").mkdir(parents=True)
        (place / ".tmp-global_step77" / "weights_00000.safetensors").write_text("half")
        (place / ".latest.123.tmp").write_text("half")
        (place / "global_step1").mkdir()  # not complete, not ours to remove
    listings = []
    for step in (5, 10, 15, 15, 8):
        train(engine, 0, 1)
        save(RUN, engine, context, folder, step, keep_last=2)
        context.barrier()
        listings.append(
            [*sorted(path.name for path in place.iterdir()), (place / "latest").read_text().strip()]
        )
        context.barrier()
    return listings


def test_old_checkpoints_go_and_the_new_one_stays(tmp_path: Path) -> None:
    listings = run_ranks(save_often, 2, tmp_path)[0]
    assert listings == [
        ["global_step1", "global_step5", "latest", "global_step5"],
        ["global_step1", "global_step10", "global_step5", "latest", "global_step10"],
        ["global_step1", "global_step10", "global_step15", "latest", "global_step15"],
        ["global_step1", "global_step10", "global_step15", "latest", "global_step15"],
        ["global_step1", "global_step15", "global_step8", "latest", "global_step8"],
    ]
    verify(tmp_path / str(RUN) / "global_step15")


def test_finding_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        find_checkpoint(folder)
    for step in (5, 10):
        (folder / f"global_step{step}").mkdir(parents=True)
        (folder / f"global_step{step}" / "index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="complete ones are there for steps 5, 10"):
        find_checkpoint(folder)
    (folder / "latest").write_text("global_step10")  # as DeepSpeed writes it, without an end of line
    assert find_checkpoint(folder) == folder / "global_step10"
    assert find_checkpoint(folder, 5) == folder / "global_step5"
    assert find_checkpoint(folder / "global_step5") == folder / "global_step5"
    with pytest.raises(CheckpointError, match="global_step7 is not a complete checkpoint: complete ones"):
        find_checkpoint(folder, 7)
    with pytest.raises(CheckpointError, match="not the one of step 7"):
        find_checkpoint(folder / "global_step5", 7)
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="is not a complete checkpoint"):
        find_checkpoint(folder)
    (folder / "global_step20").mkdir()
    (folder / "global_step20" / "mp_rank_00_model_states.pt").touch()
    with pytest.raises(CheckpointError, match=r"DeepSpeed's own files \(\*.pt\)"):
        find_checkpoint(folder, 20)


def test_what_is_not_supported_is_said() -> None:
    class ZenFlowZeroOptimizer:
        """Stands for a wrapper with state of its own."""

    with pytest.raises(CheckpointError, match="under DeepSpeed's ZenFlowZeroOptimizer are not supported"):
        layout_of(SimpleNamespace(optimizer=ZenFlowZeroOptimizer()))


def load_what_differs(folder: Path) -> tuple[int, list[int], str]:
    """Steps: loaded where rank 1 sees an older ``latest``; begun from where it found that, or nothing.

    Last what is said of a host that has none of the folder.
    """
    from training.training_runs import KEYS

    from megatron_lite.checkpoint import load as module
    from megatron_lite.config import config_from_keys
    from megatron_lite.training import run

    def counters(path: Path, *_: Any, **__: Any) -> dict[str, int]:
        return {"step": int(path.name.removeprefix("global_step")), "samples": 0, "tokens": 0}

    context = start()
    engine = make_engine(RUN)
    old, new = (save(RUN, engine, context, folder, step) for step in (1, 2))
    found, module.find_checkpoint = module.find_checkpoint, lambda *_: new if context.is_first else old
    step = load_checkpoint(folder, engine, context)["step"]
    module.find_checkpoint = found
    run.load_checkpoint = counters
    config = config_from_keys({**KEYS, "data_path": "unused"})
    begun = []
    for own in ((new, old), (new, None), (None, new)):
        state, _ = run.begin_from(own[context.rank], config, context, SimpleNamespace(deepspeed=0), unheard)
        begun.append(state.step)
    here = new if context.is_first else folder / "not mounted" / new.name
    module.find_checkpoint = lambda *_: found(here)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(new, engine, context)
    return step, begun, str(caught.value)


def test_all_ranks_load_what_rank_0_found(tmp_path: Path) -> None:
    """NFS may show a host an older ``latest`` for a while, or another run save in between."""
    first, second = run_ranks(load_what_differs, 2, tmp_path)
    assert first == second
    step, begun, sentence = first
    assert step == 2
    assert begun == [2, 2, 0]
    assert sentence.endswith("global_step2: the folder does not exist (rank 1)")


def load_weights_alone(folder: Path) -> tuple[bool, str]:
    """Whether the weights are as saved, without the optimizer's files; what is said when one is damaged."""
    context = start()
    checkpoint = trained(RUN, context, folder)
    if context.is_first:
        for path in checkpoint.glob("optimizer_*"):
            path.unlink()
    context.barrier()
    engine = make_engine(Run(0))
    load_checkpoint(checkpoint, engine, context, load_optimizer=False, load_rng=False)
    read = dict(read_weights(checkpoint))
    same = all(bool((p == read[p.spec.name]).all()) for p in engine.module.parameters())
    context.barrier()
    if context.is_first:
        truncate(checkpoint)
    context.barrier()
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(checkpoint, engine, context, load_optimizer=False, load_rng=False)
    return same, str(caught.value)


def test_weights_alone_need_their_own_files_only(tmp_path: Path) -> None:
    first, second = run_ranks(load_weights_alone, 2, tmp_path)
    assert first == second
    same, sentence = first
    assert same
    assert "weights_00001.safetensors has 100 bytes and should have" in sentence


def signs_of_loading(folder: Path) -> list[tuple[str, bool]]:
    """What rank 0 says while it loads a checkpoint of another layout."""
    context = start()
    checkpoint = trained(RUN, context, folder)
    signs: list[tuple[str, bool]] = []
    load_checkpoint(
        checkpoint,
        make_engine(Run(0)),
        context,
        sign=lambda doing, longer=False: signs.append((doing.replace(f"{checkpoint}/", ""), longer)),
    )
    return signs


def test_loading_gives_signs(tmp_path: Path) -> None:
    """Each rank verifies half of the files, and reads all that it holds."""
    for signs, kind in zip(run_ranks(signs_of_loading, 2, tmp_path), ("weights", "optimizer"), strict=True):
        said = {doing for doing, _ in signs}
        names = {f"{name}_{rank:05d}.safetensors" for name in ("weights", "optimizer") for rank in (0, 1)}
        verified = {f"verifying {name}" for name in names if kind in name}
        assert said >= verified | {f"reading {name}" for name in names}
        assert not any("verifying" in doing for doing in said - verified)
        assert "saving" not in " ".join(said)
        assert {doing for doing, longer in signs if longer} == {
            "loading: it waits for the other ranks",
            "loading: the parameters are made of the fp32 weights",
        }
