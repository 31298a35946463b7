"""Keys of the optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict

from megatron_lite.config.fields import NonNegativeFloat, PositiveFloat, Probability, Section

OPTIMIZERS = {
    "adam": "adamw",
    "adamw": "adamw",
    "cpu_torch_adam": "adamw",
    "fusedadam": "fused_adam",
    "fused_adam": "fused_adam",
    "cpu_adam": "cpu_adam",
    "cpuadam": "cpu_adam",
    "deepspeedcpuadam": "cpu_adam",
    "lion": "lion",
    "muon": "muon",
    "sgd": "sgd",
    "adafactor": "adafactor",
}
"""Spellings accepted (in any case) and what they mean here."""


def _canonical(name: Any) -> Any:
    return OPTIMIZERS.get(name.lower(), name) if isinstance(name, str) else name


class OptimizerParams(Section):
    """Arguments of the optimizer; other names go to its constructor as they are."""

    model_config = ConfigDict(extra="allow")

    lr: PositiveFloat = 1e-3
    """Largest learning rate."""
    betas: tuple[Probability, Probability] | None = None
    """Decay of Adam's averages, 0.9 and 0.999 when not given; of Lion's, 0.9 and 0.99."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    momentum: Probability = 0.0
    """Momentum of `sgd` and `muon`."""


class OptimizerBlock(Section):
    """`optimizer: {type: ..., params: {...}}`."""

    type: Annotated[
        Literal["adamw", "fused_adam", "cpu_adam", "lion", "muon", "sgd", "adafactor"],
        BeforeValidator(_canonical, json_schema_input_type=str),
    ] = "adamw"
    """`Adam` and `AdamW` are torch's fused AdamW (decoupled weight decay); `CPUAdam` and `FusedAdam` are
    DeepSpeed's, compiled on first use; `Lion`, `Muon`, `SGD`, `Adafactor`."""
    params: OptimizerParams = OptimizerParams()
    """Its arguments."""


class OptimizerSection(Section):
    """How gradients become updates."""

    optimizer: OptimizerBlock = OptimizerBlock()
    """Type and arguments of the optimizer."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of the weight matrices; biases and norms do not decay."""
    gradient_clipping: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 clips nothing."""

    @property
    def type(self) -> str:
        """The optimizer's canonical name."""
        return self.optimizer.type

    @property
    def lr(self) -> float:
        """Largest learning rate."""
        return self.optimizer.params.lr

    @property
    def betas(self) -> tuple[float, float]:
        """Decay of Adam's averages, or of Lion's (Chen et al. 2023, whose default is another one)."""
        return self.optimizer.params.betas or ((0.9, 0.99) if self.type == "lion" else (0.9, 0.999))

    @property
    def eps(self) -> float:
        """Adam's epsilon."""
        return self.optimizer.params.eps

    @property
    def momentum(self) -> float:
        """Momentum of SGD and Muon."""
        return self.optimizer.params.momentum

    @property
    def params(self) -> dict[str, Any]:
        """Further arguments of the optimizer, as given."""
        return dict(self.optimizer.params.model_extra or {})
