"""Rules about the keys of the data."""

from __future__ import annotations

from typing import Any

from megatron_lite.config.contradiction import Contradiction, Keys

TRAINING_DATA = ("data_path", "train_data_paths", "datasets")
"""Keys that name the training data: one of them is enough."""


def check_data(keys: Keys) -> dict[str, Any]:
    """Refuse keys of the data that do not agree; the direction of attention follows from what is learned."""
    named = [key for key in TRAINING_DATA if keys.get(key)]
    if len(named) > 1:
        raise Contradiction(f"{' and '.join(named)} both name the training data: keep one", *named)
    for split in ("train", "valid", "test"):
        _check_weights(keys, split)
        _check_labels(keys, split)
    _check_whole_documents(keys)
    _check_objective(keys)
    _check_direction(keys)
    _check_schedule(keys)
    if keys.get("weight_by_num_documents") and "data_temperature" in keys:
        raise Contradiction(
            "weight_by_num_documents and data_temperature both weigh the data sets by size: keep one",
            "weight_by_num_documents",
            "data_temperature",
        )
    return {"causal": not keys.get("mlm_training", False)}


def _check_weights(keys: Keys, split: str) -> None:
    paths, weights = keys.get(f"{split}_data_paths", []), keys.get(f"{split}_data_weights")
    if weights is not None and len(weights) != len(paths):
        raise Contradiction(
            f"{split}_data_weights has {len(weights)} numbers for {len(paths)} {split}_data_paths",
            f"{split}_data_weights",
            f"{split}_data_paths",
        )


def _check_labels(keys: Keys, split: str) -> None:
    key = f"{split}_label_data_paths"
    paths, labels = keys.get(f"{split}_data_paths") or [], keys.get(key)
    if not labels:
        return
    if len(labels) != len(paths):
        raise Contradiction(
            f"{key} names {len(labels)} files for {len(paths)} {split}_data_paths: name one for each",
            key,
            f"{split}_data_paths",
        )
    mode = keys.get("sampling_mode", "windows")
    if mode.startswith("documents_"):
        raise Contradiction(
            f"sampling_mode {mode} puts tokens between documents, for which {key} has no labels: choose "
            "windows or chunks, or pack_impl: pack_until_overflow",
            "sampling_mode",
            key,
        )


def _check_whole_documents(keys: Keys) -> None:
    kind = keys.get("pack_impl", "packed")
    modes = {keys.get("sampling_mode", "windows"), *(mode for _, _, mode, _ in keys.get("datasets") or [])}
    if kind != "packed" and modes != {"windows"}:
        other = min(modes - {"windows"})
        raise Contradiction(
            f"pack_impl {kind} takes whole documents where {other} cuts them: keep one",
            "pack_impl",
            "sampling_mode",
            "datasets",
        )


def _check_objective(keys: Keys) -> None:
    """Fill-in-the-middle and masked language modelling change windows of text, one of the two."""
    wanted = [key for key in ("fim_rate", "mlm_training") if keys.get(key)]
    if len(wanted) == 2:
        raise Contradiction("fim_rate and mlm_training do not go together: keep one", *wanted)
    labels = [key for split in ("train", "valid", "test") if keys.get(key := f"{split}_label_data_paths")]
    kind = keys.get("pack_impl", "packed")
    if wanted and labels:
        raise Contradiction(
            f"{wanted[0]} changes windows of text, which the labels of {labels[0]} would no longer fit: "
            "remove one",
            wanted[0],
            labels[0],
        )
    if wanted and kind != "packed":
        raise Contradiction(
            f"{wanted[0]} changes windows of text, where pack_impl {kind} gives rows of whole documents: "
            "remove one",
            wanted[0],
            "pack_impl",
        )
    if not keys.get("mlm_training"):
        return
    if keys.get("mlm_mask_id") is None:
        raise Contradiction(
            "mlm_training needs mlm_mask_id, the id of the token that stands for hidden ones", "mlm_training"
        )
    if keys.get("mlm_same_token_prob", 0.1) + keys.get("mlm_random_token_prob", 0.1) > 1:
        raise Contradiction(
            "mlm_same_token_prob and mlm_random_token_prob are shares of the same tokens, and add up to more "
            "than 1: lower them",
            "mlm_same_token_prob",
            "mlm_random_token_prob",
        )


def _check_direction(keys: Keys) -> None:
    """Attention's direction follows from what is learned; it may be said again, not otherwise."""
    hidden, causal = keys.get("mlm_training", False), keys.get("causal")
    if causal is False and not hidden:
        raise Contradiction(
            "causal: false would show each token the next one, which it is to foretell: set mlm_training or "
            "remove causal",
            "causal",
        )
    if causal and hidden:
        raise Contradiction(
            "mlm_training finds tokens from both sides, and causal: true hides one: remove causal or "
            "mlm_training",
            "causal",
            "mlm_training",
        )


def _check_schedule(keys: Keys) -> None:
    schedule = keys.get("train_data_weights_schedule") or []
    key = "train_data_weights_schedule"
    count = len(keys.get("train_data_paths") or keys.get("datasets") or [None])
    steps = [step for step, _ in schedule]
    if steps != sorted(set(steps)):
        raise Contradiction(f"the steps {steps} of {key} do not grow: sort them, each once", key)
    for step, weights in schedule:
        if len(weights) != count:
            raise Contradiction(
                f"{key} gives {len(weights)} weights at step {step} for {count} training data sets", key
            )
        if not any(weights):
            raise Contradiction(f"{key} gives every data set the weight 0 at step {step}", key)
