"""The keys of a GPT-NeoX run as keys of ours: what its model is, and how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_lite.config.keys import has_effect, typed_value
from megatron_lite.config.merge import merge
from megatron_lite.config.older_keys import rewrite
from megatron_lite.config.reader import Entry, read_file
from megatron_lite.config.schema import SECTION_OF
from megatron_lite.config.sections.model import GATED
from megatron_lite.foreign.rank_tensors import RankTensors, tensor_name
from megatron_lite.utils.errors import CheckpointError, ConfigError
from megatron_lite.utils.log import LOGGER

CARRIED = frozenset(
    {"model", "batch", "data", "objective", "optimizer", "schedule", "precision", "zero", "training"}
)
"""Sections whose keys go into model.yml. The others are of that run's machines, folders and outputs."""

MLP_TYPE = "mlp_type"
GATED_BY = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
"""The gated activation that a ``mlp_type: llama`` makes of a plain one."""

LAYER = 2
"""Number of the first transformer layer, by which the form of all is told."""


def find_configs(checkpoint: Path) -> list[Path]:
    """The YAML files that GPT-NeoX saved with ``checkpoint``; ConfigError when there are none."""
    found = sorted(path for path in (checkpoint / "configs").glob("*") if path.is_file())
    if not found:
        raise ConfigError(
            f"{checkpoint} has no configuration (configs/*.yml): name the run's YAML files with --config"
        )
    return found


class NeoxRun:
    """What the YAML ``files`` of a run say; later ones override earlier ones.

    Attributes:
        ranks: tensor ranks that wrote its checkpoints; None: the files do not say.

    Raises:
        ConfigError: a file cannot be read, or has keys that do not exist or ask for what is not there.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        messages: list[str] = []
        sources = [read_file(file) for file in files]
        mlps = {entry.value for source in sources for entry in source if entry.key == MLP_TYPE}
        self._llama = "llama" in mlps
        known = [[each for each in source if self._counts(each, messages)] for source in sources]
        self._merged = rewrite(merge(known, messages), messages)
        for message in messages:
            LOGGER.info(message)
        self.ranks: int | None = self._value("model_parallel_size")

    def _counts(self, entry: Entry, messages: list[str]) -> bool:
        """Whether a key says something here; this raises for keys that cannot be."""
        if entry.key == MLP_TYPE and entry.value == "llama":
            return False  # the activation says it
        return has_effect(entry, messages)

    def _value(self, key: str, default: Any = None) -> Any:
        return self._merged[key].value if key in self._merged else default

    def keys(self, tensors: RankTensors) -> dict[str, Any]:
        """Our keys of the run; sizes of vocabulary and MLP, and whether this has biases, are the weights'.

        Raises:
            ConfigError: the model is one that cannot be here.
            CheckpointError: the weights are of another number of ranks, or have no embedding or MLP.
        """
        if self.ranks is not None and self.ranks != tensors.ranks:
            raise CheckpointError(
                f"{tensors.folder} has files of model_parallel_size {tensors.ranks}, and the configuration "
                f"says {self.ranks}: copy all files, or name the right configuration with --config"
            )
        self._check_model(tensors)
        carried = {key: entry for key, entry in self._merged.items() if SECTION_OF[key] in CARRIED}
        for entry in carried.values():
            typed_value(entry)  # here a wrong value is still told with its place
        keys = {key: entry.value for key, entry in carried.items()}
        if "train_batch_size" in keys:
            keys.pop("gradient_accumulation_steps", None)  # it follows, on whatever number of ranks
        keys.pop("expansion_factor", None)
        keys |= keys_of_weights(tensors, self._activation())
        if keys.get("sliding_window_width"):
            keys["sliding_window_width"] += 1
            LOGGER.info("sliding_window_width is one more here, where the token itself is counted")
        return keys

    def _activation(self) -> str:
        name = self._value("activation", "gelu")
        if not self._llama:
            return str(name)
        if name not in GATED_BY:
            raise ConfigError(
                f"a GPT-NeoX model with mlp_type llama cannot have activation {name} here: it can be "
                f"{', '.join(GATED_BY)}"
            )
        return GATED_BY[name]

    def _check_model(self, tensors: RankTensors) -> None:
        """Raise for what models here compute otherwise than GPT-NeoX."""
        if self._value("use_qk_layernorm", False):
            raise ConfigError(
                "GPT-NeoX's use_qk_layernorm has weights of its own for each head, the same for queries and "
                "keys: models here cannot have that"
            )
        if self._value("moe_num_experts", 1) > 1:
            raise ConfigError("a GPT-NeoX model with experts (moe_num_experts) cannot be read")
        if self._value("gpt_j_residual", False) and not _has_biases(tensors):
            raise ConfigError(
                "GPT-NeoX leaves out the attention where gpt_j_residual meets use_bias_in_mlp: false: these "
                "weights are of a model without it, which cannot be here"
            )


def keys_of_weights(tensors: RankTensors, activation: str) -> dict[str, Any]:
    """Keys that the weights say, whatever the release took where its keys were silent."""
    width = _inner_width(tensors)
    rows = [_found(tensors, 0, "word_embeddings.weight", rank)[0] for rank in range(tensors.ranks)]
    return {
        "activation": activation,
        "intermediate_size": 3 * width if activation in GATED else width,
        "mlp_multiple_of": 1,
        "use_bias_in_mlp": _has_biases(tensors),
        "vocab_size": sum(rows),
        "make_vocab_size_divisible_by": 1,
    }


def _found(tensors: RankTensors, layer: int, key: str, rank: int = 0) -> tuple[int, ...]:
    """The shape of a tensor that must be there and have a first dimension."""
    name = tensor_name(layer, key, rank)
    if name not in tensors.found or not tensors.found[name].shape:
        raise CheckpointError(
            f"the weights in {tensors.folder} lack {name}: copy all files of the checkpoint"
        )
    return tensors.found[name].shape


LINEAR, W1 = "mlp.linear1.weight", "mlp.w1.weight"
DOWN: Mapping[str, str] = {
    LINEAR: "mlp.linear2.weight",
    "mlp.dense_h_to_4h.weight": "mlp.dense_4h_to_h.weight",
    W1: "mlp.w2.weight",
}
"""By the MLP's first matrix, as releases of GPT-NeoX have called it, its last."""


def first_matrix(tensors: RankTensors) -> str:
    """Which of :data:`DOWN` the MLPs have; CheckpointError when they have none."""
    present = tensors.keys.get(LAYER, set())
    for name in DOWN:
        if name in present:
            return name
    raise CheckpointError(
        f"the weights in {tensors.folder} have no MLP in layer {LAYER:02d} that is known here: none of "
        f"{', '.join(DOWN)} is there"
    )


def _has_biases(tensors: RankTensors) -> bool:
    """Whether MLPs have biases; releases of GPT-NeoX differ in when they do."""
    return first_matrix(tensors).replace(".weight", ".bias") in tensors.keys[LAYER]


def _inner_width(tensors: RankTensors) -> int:
    """Width inside the MLP: columns of its last matrix, over all ranks."""
    down = DOWN[first_matrix(tensors)]
    shapes = [_found(tensors, LAYER, down, rank) for rank in range(tensors.ranks)]
    return sum(shape[-1] for shape in shapes)
