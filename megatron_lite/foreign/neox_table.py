"""Which tensor of GPT-NeoX's is which of ours, and how tensor ranks divide it.

Along the rows: the embedding and head over the vocabulary, the projections to queries, keys and values, and
the first matrix of an MLP, with their biases. Along the columns: the projections that write into the residual
stream. Their biases, norms and learned positions are whole on every rank.

With ``gpt_j_residual`` each rank adds these biases to its part of the output before parts are summed: what
the model computes with is the sum of all ranks' biases. Without it, they are added once, behind the sum.
"""

from __future__ import annotations

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.foreign.neox_keys import DOWN, LAYER, LINEAR, W1, first_matrix
from megatron_lite.foreign.rank_tensors import RankTensors, tensor_name
from megatron_lite.foreign.tensor_ranks import Copied, Divided, SlicedHeads, Summed, UpAndGate
from megatron_lite.hf.family import Entry
from megatron_lite.hf.transforms import Heads, Joined, Stacked, Transform
from megatron_lite.utils.errors import CheckpointError
from megatron_lite.utils.log import LOGGER

NORM_WEIGHTS = {
    "layernorm": "weight",
    "rmsnorm": "scale",
    "scalenorm": "g",
    "non_parametric_layernorm": None,
}
"""What GPT-NeoX calls the weight of each kind of norm, if it has one."""


def table(model: ModelSection, tensors: RankTensors, old_grouping: bool | None = None) -> dict[str, Entry]:
    """By our name, the rows of the table.

    Args:
        model: what it is.
        tensors: the files; how many ranks wrote them, and what the MLP is called, is taken from there.
        old_grouping: whether grouped queries lie as until November 2024; None: where the names of the MLP are
            those until August 2024. Nothing else tells.

    Raises:
        CheckpointError: so many ranks cannot share the model.
    """
    first = first_matrix(tensors)
    for key in ("num_attention_heads", "num_kv_heads", "ffn_size"):
        if getattr(model, key) % tensors.ranks:
            raise CheckpointError(
                f"{tensors.folder} has files of model_parallel_size {tensors.ranks}, which does not divide "
                f"{key} {getattr(model, key)}: the weights are of another model"
            )
    made = _Table(model, tensors.ranks)
    made.add("embed_in.weight", 0, "word_embeddings.weight", made.rows)
    if model.pos_emb == "learned":
        made.add("embed_pos.weight", 0, "position_embeddings.weight", made.copied)
    heads = _heads(model, tensors.ranks, first != LINEAR if old_grouping is None else old_grouping)
    for layer in range(model.num_layers):
        made.add_norm(f"layers.{layer}.input_layernorm", LAYER + layer, "input_layernorm")
        made.add_attention(f"layers.{layer}.attention", LAYER + layer, heads)
        if not has_idle_norm(model):
            made.add_norm(
                f"layers.{layer}.post_attention_layernorm", LAYER + layer, "post_attention_layernorm"
            )
        made.add_mlp(f"layers.{layer}.mlp", LAYER + layer, first)
    made.add_norm("final_layer_norm", LAYER + model.num_layers + 1, "norm")
    if model.no_weight_tying:
        made.add("embed_out.weight", LAYER + model.num_layers + 2, "final_linear.weight", made.rows)
    return made.entries


def is_idle(name: str, model: ModelSection) -> bool:
    """Whether the tensor called ``name`` is known, and no part of what the model computes."""
    buffer = ".inv_freq of layer" in name  # rotary or sinusoidal frequencies, which the keys say
    return buffer or (has_idle_norm(model) and name.startswith("post_attention_layernorm."))


def has_idle_norm(model: ModelSection) -> bool:
    """Whether blocks have one norm for both halves: GPT-NeoX keeps the weights of the other one."""
    return model.gpt_j_residual and model.gpt_j_tied


def _heads(model: ModelSection, ranks: int, old_grouping: bool) -> Transform:
    """How the rows of queries, keys and values lie in all ranks' files."""
    queries, size = model.num_attention_heads // model.num_kv_heads, model.head_size
    share = model.num_kv_heads // ranks
    if queries == 1:
        return Divided(ranks)
    LOGGER.info(
        "grouped queries are read in the order that GPT-NeoX had %s November 2024",
        "until" if old_grouping else "since",
    )
    if not old_grouping:
        parts = (share * queries * size, share * size, share * size)
        return Divided(ranks, 0, Joined(Heads(share, queries, size), parts))
    if size % queries:
        raise CheckpointError(
            f"heads of {size} rows do not divide into {queries} slices, as grouped queries did in GPT-NeoX "
            "until November 2024: say --grouped-queries new"
        )
    return Divided(ranks, 0, SlicedHeads(share, queries, size))


class _Table:
    """The table while it is made."""

    def __init__(self, model: ModelSection, ranks: int) -> None:
        self.entries: dict[str, Entry] = {}
        self.rows, self.copied = Divided(ranks), Copied(ranks)
        self._columns = Divided(ranks, 1)
        self._added = Summed(ranks) if model.gpt_j_residual else self.copied
        self._model, self._ranks = model, ranks

    def add(self, ours: str, layer: int, keys: str | tuple[str, ...], transform: Transform) -> None:
        """A row; every rank has each of the tensors ``keys`` of layer number ``layer``."""
        every = (keys,) if isinstance(keys, str) else keys
        theirs = tuple(tensor_name(layer, key, rank) for key in every for rank in range(self._ranks))
        self.entries[ours] = Entry(ours, theirs, transform)

    def add_norm(self, ours: str, layer: int, key: str) -> None:
        """The rows of a norm."""
        weight = NORM_WEIGHTS[self._model.norm]
        if weight is not None:
            self.add(f"{ours}.weight", layer, f"{key}.{weight}", self.copied)
        if self._model.norm == "layernorm" and self._model.use_bias_in_norms:
            self.add(f"{ours}.bias", layer, f"{key}.bias", self.copied)

    def add_attention(self, ours: str, layer: int, heads: Transform) -> None:
        """The rows of a layer's attention."""
        into, out = "query_key_value", "dense"
        self.add(f"{ours}.{into}.weight", layer, f"attention.{into}.weight", heads)
        if self._model.use_bias_in_qkv:
            self.add(f"{ours}.{into}.bias", layer, f"attention.{into}.bias", heads)
        self.add(f"{ours}.{out}.weight", layer, f"attention.{out}.weight", self._columns)
        if self._model.use_bias_in_attn_output:
            self.add(f"{ours}.{out}.bias", layer, f"attention.{out}.bias", self._added)

    def add_mlp(self, ours: str, layer: int, first: str) -> None:
        """The rows of a layer's MLP, whose first matrix is called ``first``."""
        up, down, last = f"{ours}.dense_h_to_4h", f"{ours}.dense_4h_to_h", DOWN[first]
        inner = UpAndGate(self._ranks) if self._model.is_gated else self.rows
        if first == W1:
            self.add(f"{up}.weight", layer, (W1, "mlp.w3.weight"), Stacked(2 * self._ranks))
        else:
            self.add(f"{up}.weight", layer, first, inner)
        self.add(f"{down}.weight", layer, last, self._columns)
        if self._model.use_bias_in_mlp:
            self.add(f"{up}.bias", layer, first.replace(".weight", ".bias"), inner)
            self.add(f"{down}.bias", layer, last.replace(".weight", ".bias"), self._added)
