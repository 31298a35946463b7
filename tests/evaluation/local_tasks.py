"""Task files of lm-eval that read a few local lines, one of each kind of request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

QUESTIONS = [
    {
        "text": f"The {animal} says {sound}. " * count,
        "question": f"What does the {animal} say?",
        "choices": ["moo", "meow", "woof woof", "a\nb"],
        "answer": answer,
    }
    for count, (animal, sound, answer) in enumerate(
        [("cow", "moo", 0), ("cat", "meow", 1), ("dog", "woof woof", 2), ("漢字", "🙂", 3), ("owl", "hoo", 0)]
    )
]

KINDS: dict[str, dict[str, Any]] = {
    "tiny_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "num_fewshot": None,
    },
    "tiny_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "tiny_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 9},
        "metric_list": [{"metric": "exact_match"}],
    },
}
"""Task files, by name."""


def write_tasks(folder: Path, kinds: dict[str, dict[str, Any]] = KINDS) -> Path:
    """``kinds`` as files of ``folder``, over :data:`QUESTIONS` unless they name data of their own."""
    folder.mkdir(exist_ok=True)
    lines = folder / "questions.jsonl"
    lines.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS))
    for name, kind in kinds.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(lines)}, "test_split": "train"}
        task = {"task": name, "fewshot_split": "train"} | data | kind
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))
    return folder
