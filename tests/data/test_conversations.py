"""Prompts with answers and chats to token and label files."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_lite.data.indexed import IndexedDataset
from megatron_lite.data.preprocessing.answers import OUTPUTS
from megatron_lite.data.preprocessing.conversations import ConversationSettings, segments_of, template_beside
from megatron_lite.data.preprocessing.encode import EncodeSettings, TokenizerSource
from megatron_lite.data.preprocessing.run import preprocess
from megatron_lite.data.preprocessing.transforms import BadRecord, TextSettings
from megatron_lite.data.samples import UNCOUNTED
from megatron_lite.data.vocabulary import train_byte_level
from megatron_lite.utils.errors import DataError

SPECIALS = ("<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>")

CHATML = """{%- for message in messages -%}
    {{ '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' -%}
        {% generation %}{{ message.content + '<|im_end|>\n' }}{% endgeneration %}
    {%- else -%}
        {{ message.content + '<|im_end|>\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\n' }}
{%- endif -%}
"""

CHATS = [
    [{"role": "user", "content": "What is heapq?"}, {"role": "assistant", "content": "A heap queue."}],
    [
        {"role": "system", "content": "Be brief. 简短"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
        {"role": "assistant", "content": "4, of course"},
        {"role": "user", "content": "Thanks"},
    ],
]


@pytest.fixture(scope="module")
def folder(source_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder, with a chat template as transformers writes it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_byte_level(source_texts[:2], 500, specials=SPECIALS).save(str(folder / "tokenizer.json"))
    keys = {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"}, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))
    return folder


def write_lines(path: Path, records: list[object]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


def made(
    path: Path, vocab_file: Path, workers: int = 1, on_error: str = "stop", **keys: object
) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of every document of what is made of the file ``path``."""
    template, variables = template_beside(str(vocab_file))
    conversation = ConversationSettings(**{"template": template, "variables": variables, **keys})  # type: ignore[arg-type]
    settings = EncodeSettings(
        TokenizerSource("HFTokenizer", str(vocab_file)), OUTPUTS, text=TextSettings(conversation=conversation)
    )
    report = preprocess([str(path)], path.with_suffix(""), settings, workers, on_error=on_error)
    text, label = (IndexedDataset(report.prefixes[key]) for key in OUTPUTS)
    assert np.array_equal(text.lengths, label.lengths)
    count = range(text.document_count)
    return [(text.document(n).tolist(), label.document(n).tolist()) for n in count]


def test_a_chat_is_what_transformers_renders_and_marks(folder: Path, tmp_path: Path) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=CHATML)
    path = write_lines(tmp_path / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    documents = made(path, folder)
    assert len(documents) == len(CHATS)
    for chat, (tokens, labels) in zip(CHATS, documents, strict=True):
        text = reference.apply_chat_template(chat, tokenize=False)
        assert reference.decode(tokens[:-1]) == text
        expected = reference.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert tokens == [*expected["input_ids"], 0]
        mask = [*expected["assistant_masks"], int(chat[-1]["role"] == "assistant")]
        assert labels == [
            token if learned else UNCOUNTED for token, learned in zip(tokens, mask, strict=True)
        ]


def learned_text(folder: Path, labels: list[int]) -> str:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return library.decode([label for label in labels if label >= 0], skip_special_tokens=False)


def test_what_is_learned_of_each_form(folder: Path, tmp_path: Path) -> None:
    records: list[object] = [
        {"prompt": "def ", "completion": "heappush(heap)"},
        {"src_txt": "Frage: ", "tgt_txt": "Antwort"},
        {"src_txt": "a text to go on with"},
    ]
    plain = made(write_lines(tmp_path / "a.jsonl", records), folder, template=None, separator="\n")
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole = [library.decode(tokens, skip_special_tokens=False) for tokens, _ in plain]
    assert whole == [
        "def \nheappush(heap)<|endoftext|>",
        "Frage: \nAntwort<|endoftext|>",
        "a text to go on with<|endoftext|>",
    ]
    assert [learned_text(folder, labels) for _, labels in plain] == [
        "\nheappush(heap)<|endoftext|>",
        "\nAntwort<|endoftext|>",
        "a text to go on with<|endoftext|>",
    ]
    ((tokens, labels),) = made(write_lines(tmp_path / "b.jsonl", records[:1]), folder)
    assert learned_text(folder, labels) == "heappush(heap)<|im_end|>\n<|endoftext|>"
    assert library.decode(tokens, skip_special_tokens=False).startswith("<|im_start|>user\ndef <|im_end|>")
    path = write_lines(tmp_path / "c.jsonl", [{"conversation": CHATS[1]}])
    ((_, labels),) = made(path, folder, only_last=True)
    assert learned_text(folder, labels) == "4, of course<|im_end|>\n"
    path = write_lines(tmp_path / "d.jsonl", [{"q": "x", "context": "y", "a": "z"}, {"q": "x", "a": "z"}])
    renamed = made(path, folder, forms=((("q", "context"), "a"),), template=None, all_text=True)
    assert [learned_text(folder, labels) for _, labels in renamed] == [
        "x\nyz<|endoftext|>",
        "xz<|endoftext|>",
    ]


def test_the_command_line_of_gpt_neox(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All flags of its script, on two files divided by a comma; a chat under each of two keys."""
    broken = [{**turn, "content": turn["content"] + " schÃ¶n"} for turn in CHATS[1]]
    for name, chat in (("a", CHATS[0]), ("b", broken)):
        write_lines(tmp_path / f"{name}.jsonl", [{"chosen": chat, "rejected": chat[:-1] + chat[-1:] * 2}])
    inputs = f"{tmp_path / 'a.jsonl'},{tmp_path / 'b.jsonl'}"
    given = f"--input {inputs} --output-prefix {tmp_path / 'out'} --tokenizer-path {folder} --workers 2 "
    given += "--dataset-impl mmap --num-docs 2 --log-interval 1 --generation-role assistant --ftfy"
    tool = str(Path(__file__).resolve().parents[2] / "tools/preprocess_data_with_chat_template.py")

    def texts(name: str) -> list[str]:
        corpus = IndexedDataset(tmp_path / f"out_{name}_document")
        return [learned_text(folder, corpus.document(n).tolist()) for n in range(corpus.document_count)]

    monkeypatch.setattr(
        sys, "argv", [tool, *given.split(), "--jsonl-keys", "chosen", "rejected", "--only-last"]
    )
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(tool, run_name="__main__")
    assert f"train_label_data_paths: [{tmp_path / 'out_rejected_label_document'}]" in capsys.readouterr().out
    assert texts("chosen_label") == [
        "A heap queue.<|im_end|>\n<|endoftext|>",
        "4, of course schön<|im_end|>\n",
    ]
    assert texts("rejected_label") == texts("chosen_label")
    assert [text.count("<|im_start|>") for text in texts("rejected")] == [3, 7]

    write_lines(tmp_path / "a.jsonl", [{"conversation": CHATS[0]}])
    write_lines(tmp_path / "b.jsonl", [{"conversation": CHATS[1]}])
    monkeypatch.setattr(sys, "argv", [tool, *given.split(), "--no-mask"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(tool, run_name="__main__")
    assert texts("label") == texts("text")
    assert texts("label")[0].startswith("<|im_start|>user\nWhat is heapq?<|im_end|>")


def test_special_tokens_around_texts_are_not_put_between_segments(folder: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 2), ("<|im_end|>", 3)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "in", "completion": "out"}] * 3)
    for tokens, labels in made(path, tmp_path / "tokenizer.json", template=None):
        assert library.decode(tokens, skip_special_tokens=False) == "<|im_start|>inout<|endoftext|>"
        assert learned_text(folder, labels) == "out<|endoftext|>"


def test_files_do_not_depend_on_workers(folder: Path, tmp_path: Path) -> None:
    records: list[object] = [{"messages": CHATS[n % 2], "n": n} for n in range(500)]
    one = made(write_lines(tmp_path / "one.jsonl", records), folder)
    assert made(write_lines(tmp_path / "two.jsonl", records), folder, workers=2) == one
    assert len(one) == 500


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            {"text": "a"},
            "there is no text under any of messages; conversation; prompt with completion; src_txt with tgt",
        ),
        ({"prompt": "a"}, "there is no text"),
        ({"messages": "hello"}, "not a list of objects with role and content"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no answer to learn"),
        ({"messages": [{"role": "assistant", "content": {"a": 1}}]}, "refuses the messages"),
        ("text", "not a JSON object"),
    ],
)
def test_a_record_that_is_no_conversation(record: object, reason: str, folder: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": CHATS[0]}, record])
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{reason}"):
        made(path, folder)
    assert len(made(path, folder, on_error="skip")) == 1


def test_templates_that_do_not_work() -> None:
    chat = {"messages": CHATS[1]}
    with pytest.raises(BadRecord, match="needs a template"):
        segments_of(chat, ConversationSettings())
    with pytest.raises(DataError, match="not a Jinja template"):
        segments_of(chat, ConversationSettings(template="{% if %}"))
    only_last = "{% for m in messages %}{{ m.content if loop.last else '-' }}{% endfor %}"
    with pytest.raises(BadRecord, match="message 3 otherwise when others follow"):
        segments_of(chat, ConversationSettings(template=only_last))
    refusing = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRecord, match="roles must alternate"):
        segments_of(chat, ConversationSettings(template=refusing))
    escaping = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BadRecord, match="unsafe"):
        segments_of(chat, ConversationSettings(template=escaping))
