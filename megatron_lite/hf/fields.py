"""The fields of a config.json while they are read: none is passed over unnoticed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from megatron_lite.utils.errors import ConfigError
from megatron_lite.utils.log import LOGGER

WITHOUT_EFFECT = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path",
        "_num_labels", "architectures", "attn_implementation", "auto_map", "bad_words_ids",
        "begin_suppress_tokens", "bos_token_id",
        "classifier_dropout", "custom_pipelines", "diversity_penalty", "do_sample", "dtype", "early_stopping",
        "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label", "is_decoder",
        "is_llama_config", "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length",
        "max_sequence_length", "min_length", "model_type", "n_ctx", "name_or_path", "no_repeat_ngram_size",
        "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
        "output_hidden_states", "output_past", "output_router_logits", "output_scores", "pad_token_id",
        "predict_special_tokens", "prefix", "pretraining_tp", "problem_type", "reorder_and_upcast_attn",
        "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id", "summary_activation",
        "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj",
        "suppress_tokens", "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p",
        "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
        "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_flash_attn",
        "use_return_dict",
    }
)  # fmt: skip
"""Fields of any family that do not change what the model computes of given tokens."""

ABSENT: Any = object()
"""Stands for the default of a field that must be there."""


class Fields:
    """The content of ``path``, a config.json.

    Raises:
        ConfigError: the file is missing, or not a JSON object.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(
                f"{path.parent} is not a Hugging Face folder: it has no {path.name}; give the folder that "
                "holds it, beside the weights"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from None
        if not isinstance(self._content, dict):
            raise ConfigError(f"{path} is not a JSON object: it cannot describe a model")
        self._read: set[str] = set()

    def get(self, name: str, default: Any = ABSENT, kind: type | tuple[type, ...] = object) -> Any:
        """The field ``name``, or what transformers takes without it.

        Raises:
            ConfigError: it must be there and is not, or is not of ``kind``.
        """
        self._read.add(name)
        value = self._content.get(name, default)
        if value is ABSENT:
            raise ConfigError(f"{self.path} has no {name}, and a model of this family needs it")
        if value is not default and not isinstance(value, kind):
            raise self.refusal(name, value, "which has another type than this field has")
        return value

    def refusal(self, name: str, value: Any, why: str) -> ConfigError:
        """The error that the field ``name`` is ``value``, ``why`` that cannot be here, and what to do."""
        return ConfigError(f"{self.path} has {name} {json.dumps(value)}, {why}")

    def check_all_read(self, ignored: Collection[str] = ()) -> None:
        """Raise unless every field was read, is switched off (null, false, 0, empty) or has no effect."""
        if self._content.get("auto_map"):
            LOGGER.warning(
                "%s names a program of its own (auto_map), which is not run: the model is read as "
                "transformers reads it without trust_remote_code, as %s",
                self.path, self._content.get("model_type"),
            )  # fmt: skip
        for name, value in self._content.items():
            if value and name not in self._read | WITHOUT_EFFECT and name not in ignored:
                if name == "quantization_config":
                    raise self.refusal(
                        name, value, "so its weights are quantised: use the folder that it was made from"
                    )
                raise self.refusal(
                    name,
                    value,
                    "a field that this program does not know: if it does not change what the model computes, "
                    f"say so with --ignore {name}",
                )
