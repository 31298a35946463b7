"""Against lm-eval's own model of the exported folder: the same numbers, texts and figures."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.local_tasks import KINDS, write_tasks
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from megatron_lite.evaluation import Choice, Replicas, open_replicas
from megatron_lite.evaluation.harness import HarnessModel, manner_of
from megatron_lite.evaluation.scoring import Row, batches_of
from megatron_lite.evaluation.tasks import find_tasks, run_tasks
from megatron_lite.hf import export_folder
from megatron_lite.parallel.context import ParallelContext
from megatron_lite.utils.log import LOGGER

LIMIT = 48
ALONE = ParallelContext(0, 1, 0, torch.device("cpu"))
PAIRS = [
    ("", "Once upon a time"),
    ("", "x"),
    ("Once upon", " a time"),
    ("Once upon ", "a time"),
    ("The answer is", " A"),
    ("The answer is", " B"),
    ("The answer is", " Both"),
    ("漢字 and 🙂", " Grüße"),
    ("a context of far more than forty-eight tokens " * 3, "goes on"),
    ("", "a continuation of exactly forty-eight tokens, ok"),
    ("x", "a continuation of exactly forty-eight tokens, ok"),
]
TEXTS = [
    "",
    "a",
    "One sentence.",
    "a text of forty-eight tokens, of one context...",
    "Text. " * 40,
    "".join(map(chr, range(0x4E00, 0x4E63))),
]


@pytest.fixture(scope="module")
def replicas(checkpoint: Path) -> Replicas:
    return open_replicas(ALONE, checkpoint, batch_tokens=150)


@pytest.fixture(scope="module")
def ours(replicas: Replicas) -> HarnessModel:
    return HarnessModel(replicas.model, replicas.team, replicas.batch_tokens)


@pytest.fixture(scope="module")
def theirs(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    export_folder(checkpoint, folder)
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_log_likelihoods(ours: HarnessModel, theirs: HFLM, replicas: Replicas) -> None:
    # ... among them what the model itself would say
    (said,) = ours.generate_until(requests("generate_until", [("Once upon", {"max_gen_toks": 6})]))
    asked = requests("loglikelihood", [*PAIRS, ("Once upon", said), ("Once upon", said + "~")])
    expected = theirs.loglikelihood(asked)
    found = ours.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found[-2:]] == [True, False]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_whole_texts(ours: HarnessModel, theirs: HFLM) -> None:
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS[1:]])
    found = ours.loglikelihood_rolling(asked)
    assert found == pytest.approx(theirs.loglikelihood_rolling(asked), rel=1e-6, abs=1e-4)
    assert ours.loglikelihood_rolling(requests("loglikelihood_rolling", [("",)])) == [0.0]


def by_hand(replicas: Replicas, tokens: list[int], predicted: int) -> float:
    """The log-likelihood of the last ``predicted`` of ``tokens``, from a plain forward pass."""
    with torch.no_grad():
        logits = replicas.model.gpt(torch.tensor([tokens[:-1]]))[0].double().log_softmax(-1)
    return sum(
        float(logits[at, tokens[at + 1]]) for at in range(len(tokens) - 1 - predicted, len(tokens) - 1)
    )


def test_long_continuations_are_scored_whole(ours: HarnessModel, replicas: Replicas) -> None:
    context, continuation = "Context", "c" * 10 + "d" * 90  # 100 tokens: 48, 48 and 4
    tokens = [*b"t", *continuation.encode()]
    first, second = by_hand(replicas, tokens[:49], 48), by_hand(replicas, tokens[48:97], 48)
    third = by_hand(replicas, tokens[101 - 49 :], 4)
    ((found, greedy),) = ours.loglikelihood(requests("loglikelihood", [(context, continuation)]))
    assert found == pytest.approx(first + second + third, rel=1e-6)
    assert not greedy


def test_a_context_of_spaces_is_the_end_of_a_document(ours: HarnessModel, replicas: Replicas) -> None:
    ((found, _),) = ours.loglikelihood(requests("loglikelihood", [("  ", "abc")]))
    assert found == pytest.approx(by_hand(replicas, [256, *b"  abc"], 5), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"max_gen_toks": 12},
        {"max_gen_toks": 30, "until": ["e"]},
        {"max_gen_toks": 30, "until": ["\x7f", "zz", "a"], "do_sample": False, "temperature": 0.7},
        {"max_gen_toks": 40, "until": []},
    ],
    ids=str,
)
def test_texts(ours: HarnessModel, theirs: HFLM, options: dict[str, Any]) -> None:
    contexts = ["Once upon a time", "x", "a context of far more than forty-eight tokens " * 3, "q: 漢字"]
    asked = requests("generate_until", [(context, dict(options)) for context in contexts])
    found = ours.generate_until(asked)
    assert found == theirs.generate_until(asked)
    assert len(set(found)) > 1, "texts that are all alike prove nothing"


def test_a_stop_ends_the_text_before_it(ours: HarnessModel) -> None:
    def written(*until: str) -> str:
        options = {"until": list(until), "max_gen_toks": 40}
        return ours.generate_until(requests("generate_until", [("x", options)]))[0]

    free = written()
    stop, earlier = free[12:14], free[6:8]
    assert 0 < free.index(earlier) < free.index(stop)
    assert written(stop) == free[: free.index(stop)]
    assert written(stop, earlier) == written(earlier, stop) == free[: free.index(earlier)]
    longer = free[11:14]  # begins before ``stop`` and is complete with the same token
    assert free.index(longer) < free.index(stop)
    assert written(stop, longer) == written(longer, stop) == free[: free.index(longer)]
    assert written("never said") == free


def test_drawn_texts_depend_on_their_number_only(replicas: Replicas) -> None:
    options = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "max_gen_toks": 20}
    contexts = ["one", "a longer context", "one", "two"]
    asked = requests("generate_until", [(context, dict(options)) for context in contexts])
    narrow, wide = (HarnessModel(replicas.model, replicas.team, size) for size in (1, 10_000))
    found = narrow.generate_until(asked)
    assert found == wide.generate_until(asked)
    assert found[0] != found[2], "each repetition is drawn anew"


def test_options_without_a_meaning_are_named_once(
    ours: HarnessModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    options = {"max_gen_toks": 2, "num_beams": 4, "typical_p": 0.5}
    ours.generate_until(requests("generate_until", [(text, dict(options)) for text in ("a", "b", "c")]))
    assert [record.message.count("num_beams, typical_p") for record in caplog.records] == [1]


def test_sampling_is_what_the_task_asks() -> None:
    assert manner_of({"until": "x"}, 3).sampling.is_greedy
    drawn = manner_of({"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 7}, 3).sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.seed) == (0.5, 0.8, 7, 3)
    assert manner_of({"do_sample": True}, 0).sampling.temperature == 1.0


def test_batches_keep_to_the_tokens() -> None:
    rows = [Row((7,) * length, [(1,)]) for length in (3, 50, 1, 9, 10, 10, 2, 48, 7)]
    batches = batches_of(rows, 40)
    assert sorted(map(id, rows)) == sorted(id(row) for batch in batches for row in batch)
    assert all(len(batch) == 1 or len(batch) * len(batch[0].tokens) <= 40 for batch in batches)
    lengths = [len(row.tokens) for batch in batches for row in batch]
    assert all(first >= second for first, second in pairwise(lengths))
    assert len(batches) == 4  # 50 | 48 | 10 10 9 7 (padded to 40) | 3 2 1


def same_figures(ours: HarnessModel, theirs: HFLM, folder: Path, names: list[str], limit: int | None) -> Any:
    choice = Choice(names, folder, num_fewshot=2, limit=limit)
    manager = find_tasks(choice)
    found, expected = (run_tasks(model, manager, choice)["results"] for model in (ours, theirs))
    assert found.keys() == expected.keys() == set(names)
    for name in names:
        numbers = {key: value for key, value in expected[name].items() if isinstance(value, float)}
        assert len(numbers) > 1
        assert {key: found[name][key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
    return found


def test_tasks_of_every_kind(ours: HarnessModel, theirs: HFLM, tmp_path: Path) -> None:
    found = same_figures(ours, theirs, write_tasks(tmp_path / "tasks"), list(KINDS), None)
    assert found["tiny_rolling"]["bits_per_byte,none"] > 1


@pytest.mark.skipif("MEGATRON_LITE_TEST_DATA" not in os.environ, reason="needs MEGATRON_LITE_TEST_DATA")
def test_published_data(ours: HarnessModel, theirs: HFLM, tmp_path: Path) -> None:
    data = Path(os.environ["MEGATRON_LITE_TEST_DATA"]) / "eval"
    kinds: dict[str, dict[str, Any]] = {
        "lambada": {
            "output_type": "loglikelihood",
            "dataset_kwargs": {"data_files": str(data / "lambada_test.jsonl")},
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
            "num_fewshot": 0,
        },
        "blimp": {
            "output_type": "multiple_choice",
            "dataset_kwargs": {"data_files": str(data / "anaphor_number_agreement.jsonl")},
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
            "metric_list": [{"metric": "acc"}],
            "num_fewshot": 0,
        },
    }
    found = same_figures(ours, theirs, write_tasks(tmp_path / "tasks", kinds), list(kinds), 24)
    assert 0 < found["blimp"]["acc,none"] < 1
