"""Generation: the cache changes nothing, the batch changes nothing, transformers agrees."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from generation.tiny_runs import NEOX, make_checkpoint, tiny_config, tiny_gpt
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_lite.data.tokenizers import load_tokenizer
from megatron_lite.generation import Sampling, TextModel, generate, load_model, stream
from megatron_lite.generation.decode import context_start, generate_tokens
from megatron_lite.generation.sampling import Sampler
from megatron_lite.hf import export_folder
from megatron_lite.model import GPT
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

EOD, VOCABULARY, LIMIT = 256, 257, 48
NEVER = 260  # an id that pads the vocabulary: no text ends with it
GREEDY = Sampling(temperature=0.0)
PROMPTS = ["Once upon a time", "", "x", "A longer prompt than the others, 漢字"]
MODELS: dict[str, dict[str, Any]] = {
    "neox": NEOX,
    "learned": {"pos_emb": "learned"},
    "grouped": {"pos_emb": "rotary", "num_kv_heads": 2, "norm": "rmsnorm", "activation": "swiglu"},
    "none": {"pos_emb": "none", "no_weight_tying": True},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    make_checkpoint(folder, **NEOX)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> TextModel:
    return load_model(checkpoint, torch.device("cpu"))


def tokens_of(
    gpt: GPT, prompts: list[list[int]], sampling: Sampling, count: int, eod: int = EOD
) -> list[list[int]]:
    sampler = Sampler(sampling, range(len(prompts)))
    steps = list(generate_tokens(gpt, prompts, sampler, count, eod, VOCABULARY))
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


@torch.no_grad()
def argmax_without_cache(gpt: GPT, prompt: list[int], count: int, limit: int = LIMIT) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        context = torch.tensor([history[context_start(len(history), limit) :]])
        history.append(int(gpt(context)[0, -1, :VOCABULARY].argmax()))
    return history[len(prompt) :]


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("count", [30, 120])  # within the context, and far beyond it
def test_greedy_is_argmax_without_cache(keys: dict[str, Any], count: int) -> None:
    gpt = tiny_gpt(tiny_config(**keys))
    prompts = [[5, 6, 7, 8, 9], [200], list(range(18))]
    written = tokens_of(gpt, prompts, GREEDY, count, eod=NEVER)
    assert written == [argmax_without_cache(gpt, prompt, count) for prompt in prompts]
    assert max(len(set(tokens)) for tokens in written) > 5, "models that stutter prove nothing"


@pytest.mark.parametrize("keys", MODELS.values(), ids=MODELS)
def test_a_batch_is_one_by_one(keys: dict[str, Any]) -> None:
    gpt = tiny_gpt(tiny_config(**keys))
    prompts = [[5, 6, 7, 8, 9], [200], list(range(40)), [1] * 48]
    sampling = Sampling(temperature=0.9, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=5)
    together = tokens_of(gpt, prompts, sampling, 70)
    for number, prompt in enumerate(prompts):
        sampler = Sampler(sampling, [number])
        alone = [token for (token,) in generate_tokens(gpt, [prompt], sampler, 70, EOD, VOCABULARY)]
        assert alone == together[number]


def test_recomputing_is_caching() -> None:
    gpt = tiny_gpt(tiny_config(**NEOX))
    prompts = [[5, 6, 7], list(range(30))]
    cached, recomputed = (
        list(
            generate_tokens(gpt, prompts, Sampler(Sampling(seed=2), range(2)), 60, EOD, VOCABULARY, recompute)
        )
        for recompute in (False, True)
    )
    assert cached == recomputed


def test_a_row_stops_at_the_end_of_document() -> None:
    gpt = tiny_gpt(tiny_config(**NEOX))
    prompts = [[5, 6, 7], [8, 9], [100, 101, 102, 103]]
    endless = tokens_of(gpt, prompts, GREEDY, 20, eod=NEVER)
    eod = endless[0][4]  # whatever the first row says fifth ends a document
    stopped = tokens_of(gpt, prompts, GREEDY, 20, eod)
    for tokens, all_tokens in zip(stopped, endless, strict=True):
        end = all_tokens.index(eod) + 1 if eod in all_tokens else 20
        assert tokens == all_tokens[:end]
    assert len(stopped[0]) <= 5


def test_padding_ids_are_never_chosen() -> None:
    gpt = tiny_gpt(tiny_config(**NEOX))
    head = gpt.layers[-1].weight
    with torch.no_grad():
        head[VOCABULARY:] = head[:1] * 100
    written = tokens_of(gpt, [[1, 2, 3]] * 8, Sampling(temperature=5.0), 40)
    assert max(map(max, written)) < VOCABULARY


def test_context_start_keeps_half_a_context_at_least() -> None:
    for limit in range(1, 12):
        for length in range(1, 60):
            kept = length - context_start(length, limit)
            assert min(length, limit - max(1, limit // 2) + 1) <= kept <= limit


def test_equals_transformers_generate(checkpoint: Path, model: TextModel, tmp_path: Path) -> None:
    export_folder(checkpoint, tmp_path / "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for sampling, options in (
        (GREEDY, {}),
        (Sampling(0.0, repetition_penalty=1.5), {"repetition_penalty": 1.5}),
        (Sampling(0.0, no_repeat_ngram_size=2), {"no_repeat_ngram_size": 2}),
    ):
        for prompt in (PROMPTS[0], PROMPTS[2]):
            ids = tokenizer(prompt, return_tensors="pt")
            expected = theirs.generate(
                **ids, max_new_tokens=30, do_sample=False, pad_token_id=EOD, **options
            )[0]
            (sample,) = generate(model, [prompt], sampling, 30)
            assert sample.tokens == len(expected) - ids.input_ids.shape[1]
            # ours decodes the continuation alone: compare whole texts
            assert prompt + sample.text == model.tokenizer.decode(expected.tolist())


def test_samples_do_not_depend_on_the_batch_size(model: TextModel) -> None:
    sampling = Sampling(temperature=1.0, seed=3)
    all_at_once, one_by_one = (
        list(generate(model, PROMPTS, sampling, 20, num_samples=3, batch_size=size)) for size in (64, 1)
    )
    assert all_at_once == one_by_one
    assert [sample.prompt for sample in all_at_once] == [prompt for prompt in PROMPTS for _ in range(3)]
    assert len({sample.text for sample in all_at_once}) == len(all_at_once)


def test_seeds(model: TextModel) -> None:
    texts = [
        [sample.text for sample in generate(model, PROMPTS, Sampling(seed=seed), 20)] for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_streaming_gives_the_same_text(model: TextModel, prompt: str) -> None:
    sampling = Sampling(temperature=1.0, seed=4)
    (sample,) = generate(model, [prompt], sampling, 60)
    assert "".join(stream(model, prompt, sampling, 60)) == sample.text


def test_an_over_long_prompt_keeps_its_last_tokens_and_says_so(
    model: TextModel, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    long = "".join(chr(97 + i % 26) for i in range(100))
    with caplog.at_level(logging.WARNING):
        (sample,) = generate(model, [long], GREEDY, 8)
    assert "100 tokens" in caplog.text
    assert "last 48" in caplog.text
    (short,) = generate(model, [long[-48:]], GREEDY, 8)
    assert sample.text == short.text
    assert sample.prompt == long


def test_loading_gives_the_weights_of_the_step(checkpoint: Path) -> None:
    tokens = torch.arange(20)[None]
    for step, seed in ((None, 7), (0, 0), (7, 7)):
        gpt = load_model(checkpoint, torch.device("cpu"), step=step).gpt
        assert torch.equal(gpt(tokens), tiny_gpt(tiny_config(**NEOX), seed)(tokens))
    with pytest.raises(CheckpointError):
        load_model(checkpoint, torch.device("cpu"), step=3)


def test_loading_in_another_dtype(checkpoint: Path) -> None:
    loaded = load_model(checkpoint, torch.device("cpu"), torch.bfloat16).gpt
    expected = tiny_gpt(tiny_config(**NEOX), 7, torch.bfloat16)
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded(tokens), expected.to(torch.bfloat16)(tokens))


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    keys = NEOX | {"no_weight_tying": False}
    make_checkpoint(tmp_path, **keys)
    gpt = load_model(tmp_path, torch.device("cpu")).gpt
    assert gpt.layers[0].weight is gpt.layers[-1].weight
    tokens = torch.arange(20)[None]
    assert torch.equal(gpt(tokens), tiny_gpt(tiny_config(**keys), 7)(tokens))


def test_the_tokenizer_is_the_runs(model: TextModel) -> None:
    assert model.tokenizer.fingerprint == load_tokenizer(tiny_config(**NEOX).data).fingerprint
