"""What a Hugging Face family is: its config.json and its tensors, each said once for both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_lite.config import Config
from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import Part
from megatron_lite.hf.transforms import PLAIN, Transform

LAYER = "{i}"
"""Stands for the number of a layer in a name."""

NEUTRAL = frozenset(
    {
        "attention_backend", "attention_dropout", "causal", "checkpoint_activations", "checkpoint_num_layers",
        "expansion_factor", "hidden_dropout", "init_method", "init_method_std", "mlp_multiple_of",
        "make_vocab_size_divisible_by", "moe_loss_coeff", "output_layer_init_method", "seq_length",
        "torch_compile", "use_bias_in_attn_linear", "vocab_size",
    }
)  # fmt: skip
"""Keys that a trained model does not depend on, or not beyond what other keys and the tensors say."""

IDLE: Mapping[str, Callable[[ModelSection], bool]] = {
    "kv_channels": lambda model: model.head_size * model.num_attention_heads == model.hidden_size,
    "gpt_j_tied": lambda model: not model.gpt_j_residual,
    "layernorm_epsilon": lambda model: model.norm not in ("layernorm", "non_parametric_layernorm"),
    "use_bias_in_norms": lambda model: model.norm != "layernorm",
    "rms_norm_epsilon": lambda model: model.norm != "rmsnorm",
    "rotary_pct": lambda model: model.pos_emb != "rotary",
    "rotary_emb_base": lambda model: model.pos_emb != "rotary",
    "max_position_embeddings": lambda model: model.pos_emb != "learned",
    "moe_top_k": lambda model: model.moe_num_experts == 1,
    "expert_interval": lambda model: model.moe_num_experts == 1,
}
"""Keys that change nothing beside some values of others, and whether that is so."""


ROTARY_BUFFERS = r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$"
"""Names of what follows from the rotation's base, and was once saved."""


@dataclass(frozen=True)
class Entry:
    """One row of a family's table: a tensor of ours, and the same as one or several of theirs.

    Attributes:
        ours: global name, with :data:`LAYER` where the layer's number goes.
        theirs: names in the family's files, likewise, as ``transform`` orders them.
        transform: the way there and back.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform = PLAIN

    def of_layer(self, number: int) -> Entry:
        """The row of layer ``number``."""
        ours, *theirs = (name.replace(LAYER, str(number)) for name in (self.ours, *self.theirs))
        return Entry(ours, tuple(theirs), self.transform)


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
        name: ``model_type`` of its config.json.
        architecture: its class for causal language models.
        parts: what its config.json says. Keys of the model that no part speaks of have their default.
        entries: the table for a configuration; a tied head is not in it.
        renames: pattern → replacement, for names of tensors that other releases wrote.
        passed_over: patterns of the names of tensors that old files have and nobody needs (``re.search``).
        tied_head: name of the head's tensor, which some files have though it is the embedding's.
        fused: pattern of the end of a name → what stands there for each expert's parts, {j} being its number:
            for a tensor of some files, [experts, rows, columns], that holds them all, the parts laid end to
            end along the rows.
    """

    name: str
    architecture: str
    parts: tuple[Part, ...]
    entries: Callable[[ModelSection], list[Entry]]
    renames: tuple[tuple[str, str], ...] = ()
    passed_over: tuple[str, ...] = (ROTARY_BUFFERS,)
    tied_head: str = "lm_head.weight"
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def keys(self, fields: Fields) -> dict[str, Any]:
        """Our keys for a config.json; ConfigError for what we cannot express."""
        return {key: value for part in self.parts for key, value in part.read(fields).items()}

    def config(self, config: Config) -> dict[str, Any]:
        """config.json of ``config``, without dtype and special tokens."""
        fields = {name: value for part in self.parts for name, value in part.write(config.model).items()}
        # Without the last field some families take a token for padding that a smaller vocabulary has not.
        head = {"architectures": [self.architecture], "model_type": self.name}
        return {**head, **fields, "use_cache": True, "pad_token_id": None}

    def reasons_against(self, config: Config) -> Iterator[str]:
        """What of ``config`` it cannot have; nothing when it can express it."""
        model = config.model
        for part in self.parts:
            yield from part.reasons_against(model)
        spoken_of = NEUTRAL.union(*(part.keys for part in self.parts))
        for key, described in ModelSection.model_fields.items():
            idle = key in IDLE and IDLE[key](model)
            if key not in spoken_of and not idle and getattr(model, key) != described.default:
                yield f"{key} {getattr(model, key)}"

    def table(self, config: Config) -> dict[str, Entry]:
        """The table with the layers written out, by our name."""
        rows: dict[str, Entry] = {}
        layers: list[Entry] = []
        for entry in self.entries(config.model):
            if LAYER in entry.ours:
                layers.append(entry)
                continue
            rows |= _of_all_layers(layers, config.model.num_layers)
            layers = []
            rows[entry.ours] = entry
        return rows | _of_all_layers(layers, config.model.num_layers)

    def current_name(self, name: str) -> str:
        """The name that a tensor called ``name`` in a file has today."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def parts_of(self, name: str) -> tuple[str, ...]:
        """If ``name`` in a file is all experts' tensor: names of an expert's parts, {j} for its number."""
        for pattern, parts in self.fused:
            if re.search(pattern, name):
                return tuple(re.sub(pattern, part, name) for part in parts)
        return ()

    def passes_over(self, name: str) -> bool:
        """Whether the tensor called ``name`` in a file is known, and needed by nobody."""
        return any(re.search(pattern, name) for pattern in self.passed_over)


def _of_all_layers(entries: list[Entry], layers: int) -> dict[str, Entry]:
    """Rows of layers, layer after layer, as files have them."""
    rows = (entry.of_layer(number) for number in range(layers) for entry in entries)
    return {row.ours: row for row in rows}


def linear(
    ours: str, theirs: str | tuple[str, ...], transform: Transform = PLAIN, bias: bool = True
) -> list[Entry]:
    """The rows of a module's weight and, if it has one, bias; names without ``.weight`` and ``.bias``."""
    names = (theirs,) if isinstance(theirs, str) else theirs
    parts = ("weight", "bias") if bias else ("weight",)
    return [Entry(f"{ours}.{part}", tuple(f"{name}.{part}" for name in names), transform) for part in parts]


def norm(model: ModelSection, ours: str, theirs: str) -> list[Entry]:
    """The rows of a norm of the residual stream: its weight and bias, where the kind of norm has them."""
    if model.norm == "non_parametric_layernorm":
        return []
    return linear(ours, theirs, bias=model.norm == "layernorm")
