"""Any number of ranks gives the same scores; a text's figures are those of training's evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation.local_tasks import KINDS, write_tasks
from generation.tiny_runs import NEOX, make_checkpoint
from ranks import run_ranks
from training.training_runs import run

from megatron_lite.data.indexed import IndexedWriter
from megatron_lite.evaluation import Choice, Replicas, open_replicas
from megatron_lite.evaluation.scoring import Row, batches_of
from megatron_lite.evaluation.tasks import find_tasks
from megatron_lite.evaluation.writing import Manner, Opening
from megatron_lite.generation import Sampling
from megatron_lite.parallel.context import ParallelContext, context_from_environment
from megatron_lite.utils.errors import ConfigError, DataError

ALONE = ParallelContext(0, 1, 0, torch.device("cpu"))
EVERY_TOKEN = [(token,) for token in range(272)]
ROWS = [
    Row(tuple(range(3 * number, 4 * number + 1)), [(number, 9)[-min(number + 1, 2) :], *EVERY_TOKEN])
    for number in range(12)
]
DRAWN, LIKELIEST = Sampling(0.9, top_p=0.9, seed=4), Sampling(0.0)


def answers(replicas: Replicas, text: str) -> dict[str, Any] | None:
    """What rank 0 hears from its team, of every kind of work."""
    openings = [Opening(tuple(range(number + 1)), number) for number in range(6)]
    pieces = [(openings[at : at + 3], Manner(how, 12)) for how in (DRAWN, LIKELIEST) for at in (0, 3)]
    with replicas.team.led() as leads:
        if not leads:
            return None
        found = replicas.team.do("score", batches_of(ROWS, 60))
        scores = [score for batch in found for row in batch for score in row]
        return {
            "log_likelihoods": [score.log_likelihood for score in scores],
            "greedy": [score.is_greedy for score in scores],
            "texts": replicas.team.do("write", pieces),
            "figures": replicas.text([text]).as_dict(),
        }


def answers_of_ranks(checkpoint: Path, text: str, tensor_ranks: int) -> dict[str, Any] | None:
    context = context_from_environment()
    return answers(open_replicas(context, checkpoint, tensor_ranks=tensor_ranks, batch_tokens=60), text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [{"text": f"Document {number}. " * number} for number in range(1, 9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


def same(found: dict[str, Any] | None, expected: dict[str, Any], tolerance: float) -> None:
    assert found is not None
    assert found["greedy"] == expected["greedy"]
    assert found["texts"] == expected["texts"]
    assert found["log_likelihoods"] == pytest.approx(expected["log_likelihoods"], abs=tolerance)
    assert found["figures"] == pytest.approx(expected["figures"], rel=tolerance)


def test_replicas_answer_as_one_rank(checkpoint: Path, text: str) -> None:
    expected = answers(open_replicas(ALONE, checkpoint, batch_tokens=60), text)
    assert expected is not None
    first, *others = run_ranks(answers_of_ranks, 3, checkpoint, text, 1)
    same(first, expected, 0.0)
    assert others == [None, None]


@pytest.mark.parametrize(
    ("keys", "ranks", "tensor_ranks"),
    [
        (NEOX, 4, 2),
        ({"num_kv_heads": 1, "activation": "swiglu", "norm": "rmsnorm", "intermediate_size": 48}, 2, 2),
        ({"moe_num_experts": 4, "moe_top_k": 2}, 2, 2),
    ],
    ids=["two of two", "one key head, tied head", "experts"],
)
def test_ranks_that_share_the_layers_answer_as_one(
    tmp_path: Path, text: str, keys: dict[str, Any], ranks: int, tensor_ranks: int
) -> None:
    make_checkpoint(tmp_path, **keys)
    expected = answers(open_replicas(ALONE, tmp_path, batch_tokens=60), text)
    assert expected is not None
    assert sum(expected["greedy"]) == len(ROWS), "of every row the likeliest token"
    same(run_ranks(answers_of_ranks, ranks, tmp_path, text, tensor_ranks)[0], expected, 1e-5)


def test_ranks_that_do_not_fit_are_told(checkpoint: Path) -> None:
    three = ParallelContext(0, 3, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match="3 ranks do not divide"):
        open_replicas(three, checkpoint, tensor_ranks=2)


def task_results(checkpoint: Path, folder: Path, cache: str) -> dict[str, Any] | None:
    import datasets

    datasets.config.HF_DATASETS_CACHE = Path(cache)
    replicas = open_replicas(context_from_environment(), checkpoint, batch_tokens=200)
    with replicas.team.led() as leads:
        if not leads:
            return None
        choice = Choice(list(KINDS), folder, limit=4)
        return replicas.tasks(find_tasks(choice), choice)


def test_tasks_on_two_ranks_are_those_of_one(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path / "tasks")
    one, (two, other) = (
        run_ranks(task_results, ranks, checkpoint, folder, str(tmp_path / "cache")) for ranks in (1, 2)
    )
    assert two == one[0]
    assert other is None
    assert two["results"]["tiny_choice"]["sample_len"] == 4


@pytest.mark.parametrize(
    "keys", [{}, {"eod_mask_loss": True}, {"reset_attention_mask": True, "reset_position_ids": True}], ids=str
)
def test_a_texts_figures_are_those_of_training(tmp_path: Path, keys: dict[str, Any]) -> None:
    texts = [f"Document {number}: " + "one more " * number for number in range(9)]
    length = sum(len(text) + 1 for text in texts)
    texts[-1] += "." * (-(length - 1) % 32)  # no token is left over in windows of 32
    with IndexedWriter(tmp_path / "corpus", np.dtype(np.uint16)) as writer:
        for text in texts:
            writer.add([*text.encode(), 256])
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    data = {"data_path": None, "train_data_paths": [str(tmp_path / "corpus")]}
    data["valid_data_paths"] = data["train_data_paths"]
    more = {"train_iters": 2, "eval_iters": 99, "num_layers": 1, **data, **keys}
    valid = next(each for each in run(tmp_path / "run", tmp_path / "corpus", **more) if "valid/loss" in each)

    replicas = open_replicas(ALONE, tmp_path / "run" / "checkpoints", batch_tokens=70)
    figures = replicas.text([str(tmp_path / "text.jsonl")], "body")

    assert figures.loss == pytest.approx(valid["valid/loss"], rel=1e-5)
    assert figures.perplexity == pytest.approx(valid["valid/perplexity"], rel=1e-5)
    assert figures.bits_per_byte == pytest.approx(valid["valid/bits_per_byte"], rel=1e-5)
    assert figures.documents == len(texts)
    assert figures.bytes == sum(map(len, texts)) - 1


def test_a_last_window_that_is_short_counts(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 60)  # windows of 48 and of 12 tokens, the end of the document
    replicas = open_replicas(ALONE, checkpoint)
    figures = replicas.text([str(tmp_path / "text.txt")])
    tokens, nats = [*b"x" * 60, 256], 0.0
    for start, stop in ((0, 48), (48, 60)):
        with torch.no_grad():
            logits = replicas.model.gpt(torch.tensor([tokens[start:stop]]))[0].double().log_softmax(-1)
        nats -= sum(
            float(row[token]) for row, token in zip(logits, tokens[start + 1 : stop + 1], strict=True)
        )
    assert figures.tokens == 60
    assert figures.loss == pytest.approx(nats / 60, rel=1e-6)
    assert figures.bits_per_byte == pytest.approx(nats / math.log(2) / 59, rel=1e-6)


def test_a_text_of_nothing_is_told(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="empty"):
        open_replicas(ALONE, checkpoint).text([str(tmp_path / "empty.txt")])


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, mlm_training=True, mlm_mask_id=0)
    with pytest.raises(ConfigError, match="hidden tokens"):
        open_replicas(ALONE, tmp_path)
