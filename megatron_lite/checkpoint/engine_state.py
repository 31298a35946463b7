"""What must also come back for a resume to be exact: counters, loss scale, random generators."""

from __future__ import annotations

import base64
import json
import random
from typing import Any

import numpy as np
import torch

from megatron_lite.checkpoint.layouts.layout import Layout

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's counters, by the engine's attribute names."""

SCALER_COUNTERS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""The moving parts of DeepSpeed's dynamic loss scalers (not all have all), by their attribute names."""


def counters_of(engine: Any) -> dict[str, int]:
    """DeepSpeed's counters."""
    return {name: int(getattr(engine, name)) for name in COUNTERS}


def restore_counters(engine: Any, saved: dict[str, int]) -> None:
    """Set DeepSpeed's counters."""
    for name in COUNTERS:
        setattr(engine, name, saved[name])


def loss_scaler_of(layout: Layout) -> dict[str, float]:
    """The dynamic loss scale and its counters; empty when the scale does not move."""
    scaler = layout.loss_scaler
    if scaler is None or not _is_dynamic(scaler):
        return {}
    return {name: getattr(scaler, name) for name in SCALER_COUNTERS if hasattr(scaler, name)}


def restore_loss_scaler(layout: Layout, saved: dict[str, float]) -> None:
    """Set the dynamic loss scale; nothing happens where either run has none."""
    scaler = layout.loss_scaler
    if scaler is None or not _is_dynamic(scaler):
        return
    for name, value in saved.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _is_dynamic(scaler: Any) -> bool:
    # DynamicLossScaler has the one attribute, LossScaleConfig the other.
    return bool(getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False))


def rng_state(device: torch.device) -> str:
    """This process's random generators (Python, numpy, torch, accelerator) as JSON text, about 20 kB."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _pack(torch.get_rng_state()),
    }
    if device.type != "cpu":
        state[device.type] = _pack(torch.get_device_module(device).get_rng_state(device))
    return json.dumps(state)


def restore_rng_state(text: str, device: torch.device) -> None:
    """Set this process's random generators to what :func:`rng_state` saw."""
    state = json.loads(text)
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_unpack(state["torch"]))
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(_unpack(state[device.type]), device)


def _pack(state: torch.Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _unpack(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())
