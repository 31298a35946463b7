"""Parts of config.json that say which layers have windows, and how wide they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from megatron_lite.config.sections.model import ModelSection
from megatron_lite.hf.fields import Fields
from megatron_lite.hf.parts import Part

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW_KEYS = ("attention_config", "sliding_window_width")


@dataclass(frozen=True)
class FullAttention(Part):
    """Every layer sees all that came before."""

    keys = WINDOW_KEYS

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Windows."""
        if any(model.attention_windows):
            yield f"sliding_window_width {model.sliding_window_width}"


@dataclass(frozen=True)
class OneWindow(Part):
    """Every layer sees as many tokens, all where the field is null."""

    default: int | None
    theirs: str = "sliding_window"
    keys = WINDOW_KEYS

    def read(self, fields: Fields) -> dict[str, Any]:
        """The window."""
        return {"sliding_window_width": fields.get(self.theirs, self.default, (int, type(None)))}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The window of the first layer, which is that of all."""
        return {self.theirs: model.attention_windows[0]}

    def reasons_against(self, model: ModelSection) -> Iterator[str]:
        """Layers that differ."""
        if len(set(model.attention_windows)) > 1:
            yield "attention_config with windows in some layers only"


@dataclass(frozen=True)
class SwitchedWindow(OneWindow):
    """One window, which a field of its own switches on."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """The window, if it is on."""
        if fields.get("use_sliding_window", False, bool):
            return super().read(fields)
        for name in (self.theirs, "max_window_layers"):
            fields.get(name, None)  # means nothing
        return {"sliding_window_width": None}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """Window and switch."""
        return {"use_sliding_window": model.attention_windows[0] is not None, **super().write(model)}


@dataclass(frozen=True)
class WindowedLayers(Part):
    """Some layers have windows: those that ``layer_types`` names, or from ``max_window_layers`` on (Qwen)."""

    keys = WINDOW_KEYS

    def read(self, fields: Fields) -> dict[str, Any]:
        """The kind of attention of every layer."""
        layers = fields.get("num_hidden_layers", kind=int)
        first = fields.get("max_window_layers", 28, int)
        width = fields.get("sliding_window", 4096, (int, type(None)))
        width = width if fields.get("use_sliding_window", False, bool) else None
        types = fields.get("layer_types", None, (list, type(None)))
        if types is None:
            types = [SLIDING if width is not None and layer >= first else FULL for layer in range(layers)]
        if len(types) != layers or not {*types} <= {FULL, SLIDING} or (width is None and SLIDING in types):
            raise fields.refusal(
                "layer_types", types, f"which does not make {layers} layers of {FULL} or {SLIDING}"
            )
        if width is None or SLIDING not in types:
            return {}
        runs = [(kind, len(list(group))) for kind, group in groupby(types)]
        pattern = [[["local" if kind == SLIDING else "global"], count] for kind, count in runs]
        return {"attention_config": pattern, "sliding_window_width": width}

    def write(self, model: ModelSection) -> dict[str, Any]:
        """The kind of every layer."""
        windows = model.attention_windows
        width = next(filter(None, windows), None)
        return {
            "use_sliding_window": width is not None,
            "sliding_window": width,
            "max_window_layers": next((i for i, window in enumerate(windows) if window), model.num_layers),
            "layer_types": [SLIDING if window else FULL for window in windows],
        }
