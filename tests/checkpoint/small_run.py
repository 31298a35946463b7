"""A very small training run under DeepSpeed, for the tests of checkpoints (run inside ``run_ranks``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from megatron_lite.parallel.context import ParallelContext, context_from_environment
from megatron_lite.parallel.parameter import ParameterFactory

GLOBAL_BATCH = 12  # for 1, 2, 3 ranks
VOCABULARY, WIDTH, LENGTH = (
    13,
    10,
    6,
)  # nothing divides evenly: partitions cut through parameters and end in padding
CONFIG_KEYS = {"hidden_size": WIDTH, "train-iters": 20}


@dataclass(frozen=True)
class Run:
    """One way to train: ZeRO stage, precision, optimizer."""

    stage: int = 0
    precision: str = "fp32"
    optimizer: str = "adamw"
    offload: bool = False
    offload_parameters: bool = False
    dropout: float = 0.0
    grad_accum_dtype: str | None = None
    zero: tuple[tuple[str, Any], ...] = ()
    frozen: bool = False
    partitioned_from_start: bool = False

    def __str__(self) -> str:
        offload = "-offload" * self.offload + "-parameters" * self.offload_parameters
        more = "".join(f"-{key}" for key, _ in self.zero) + "-frozen" * self.frozen
        more += f"-{self.grad_accum_dtype}" if self.grad_accum_dtype else ""
        more += "-init" * self.partitioned_from_start
        return f"zero{self.stage}-{self.precision}-{self.optimizer}{offload}{more}"


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an interpolated momentum."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                p.add_(torch.lerp(p.grad, state["exp_avg"], 0.9).sign_(), alpha=-group["lr"])
                state["exp_avg"].lerp_(p.grad, 0.01)


class SmallModel(nn.Module):
    """Embedding, a hidden layer with dropout, a head: matrices and vectors of odd sizes."""

    def __init__(self, factory: ParameterFactory, dropout: float, width: int = WIDTH) -> None:
        super().__init__()
        self.dropout = dropout

        def normal(value: torch.Tensor, generator: torch.Generator) -> None:
            value.normal_(0, 0.3, generator=generator)

        self.embed = factory.make("embed_in.weight", (VOCABULARY, width), normal)
        self.hidden = factory.make("layers.0.mlp.dense.weight", (2 * width + 1, width), normal)
        self.bias = factory.make("layers.0.mlp.dense.bias", (2 * width + 1,), normal)
        self.head = factory.make("embed_out.weight", (VOCABULARY, 2 * width + 1), normal)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = F.gelu(F.linear(F.embedding(tokens, self.embed), self.hidden, self.bias))
        logits = F.linear(F.dropout(hidden, self.dropout, self.training), self.head)
        return F.cross_entropy(logits.float().view(-1, VOCABULARY), labels.view(-1))


def start() -> ParallelContext:
    """This rank, ready to make engines."""
    import deepspeed

    from megatron_lite.training import deepspeed_defects

    deepspeed_defects.skip_shared_memory_build()
    deepspeed_defects.allow_fp16_on_cpu()
    deepspeed_defects.import_muon(compiled=False)
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(1000 + dist.get_rank())
    return context_from_environment()


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with matrices and vectors in two groups."""
    matrices = {"params": [p for p in model.parameters() if p.spec.decays], "weight_decay": 0.1}
    vectors = {"params": [p for p in model.parameters() if not p.spec.decays], "weight_decay": 0.0}
    groups = [matrices, vectors] if not run.frozen else [matrices]
    if run.optimizer == "muon":
        return make_muon(matrices, vectors)
    if run.optimizer == "cpuadam":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=3e-2)
    makers = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=3e-2, fused=True),
        "sgd": lambda: torch.optim.SGD(groups, lr=1e-1, momentum=0.9),
        "sgd-without-momentum": lambda: torch.optim.SGD(groups, lr=1e-1),
        "lion": lambda: Lion(groups, lr=3e-3),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=3e-2),
    }
    return makers[run.optimizer]()


def make_muon(matrices: dict[str, Any], vectors: dict[str, Any]) -> torch.optim.Optimizer:
    """DeepSpeed's Muon for the matrices, Adam for the vectors."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group, use in ((matrices, True), (vectors, False)):
        group |= {"use_muon": use, "lr": 1e-2}
        for p in group["params"]:
            p.use_muon = use
    return MuonWithAuxAdam([matrices, vectors])


def make_engine(run: Run, width: int = WIDTH) -> Any:
    """DeepSpeed's engine around a fresh model."""
    import deepspeed

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[run.precision]
    zero = {"stage": run.stage, "stage3_param_persistence_threshold": 50, **dict(run.zero)}
    if run.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    if run.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if run.precision == "bf16":
        config["bf16"] = {"enabled": True}
    if run.precision == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 1}
    if run.grad_accum_dtype:
        config["data_types"] = {"grad_accum_dtype": run.grad_accum_dtype}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=run.partitioned_from_start):
        model = SmallModel(ParameterFactory(seed=1, dtype=dtype), run.dropout, width)
    model.bias.requires_grad_(not run.frozen)
    if run.optimizer == "muon":
        config["gradient_clipping"] = 0.0  # it would act on the orthogonalised update
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=make_optimizer(run, model))
    return engine


def train(engine: Any, first: int, last: int) -> list[float]:
    """Steps ``first + 1`` to ``last`` on data that depends on the step only; the global losses."""
    rank, size = dist.get_rank(), dist.get_world_size()
    share = GLOBAL_BATCH // size
    losses = []
    for step in range(first, last):
        tokens = torch.randint(
            VOCABULARY, (GLOBAL_BATCH, LENGTH), generator=torch.Generator().manual_seed(step)
        )
        mine = tokens[rank * share : (rank + 1) * share]
        loss = engine(mine, (mine * 3 + 1) % VOCABULARY)
        engine.backward(loss)
        engine.step()
        total = loss.detach().float() / size
        dist.all_reduce(total)
        losses.append(total.item())
    return losses


def save(run: Run, engine: Any, context: ParallelContext, folder: Path, step: int, **options: Any) -> Path:
    """Save with the state of a small trainer."""
    from megatron_lite.checkpoint import save_checkpoint

    return save_checkpoint(folder / str(run), step, engine, {"step": step}, CONFIG_KEYS, context, **options)
