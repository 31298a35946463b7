"""The grid: a tiny model under every layout of up to eight ranks must train as it does on one rank.

``make grid`` runs it all and prints a line a layout; ``--help`` says what else it does. CI runs a subset in
which every pair of features occurs (``test_grid.py``).
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from layout_runs import KEYS, Case, Outcome, outcomes

from megatron_lite.checkpoint import read_weights
from megatron_lite.config import config_from_keys
from megatron_lite.planner.traffic import step_traffic
from megatron_lite.utils.errors import ConfigError

MAX_RANKS = 8
BATCH, MICRO_BATCH = 8, 2
STEPS = 20
LOSS_TOLERANCE, WEIGHT_TOLERANCE, TRAFFIC_TOLERANCE = 1e-5, 1e-4, 0.05
PER_CALL = 12
"""Layouts that the same processes run one after the other; their process groups add up."""

DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "tp": (1, 2, 4),
    "pp": (1, 2, 4),
    "dp": (1, 2),
    "zero": (0, 1, 2, 3),
    "sp": (False, True),
    "cp": ("1", "ulysses", "ring"),
    "ep": (0, 1, 2),
}
"""The values of each feature; ``ep`` 0 is a model without experts."""


@dataclass(frozen=True, order=True)
class Layout:
    """One layout: degrees, ZeRO stage, whether the sequence is split, the kind of context parallelism."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 0
    sp: bool = False
    cp: str = "1"
    ep: int = 0

    @property
    def ranks(self) -> int:
        """Ranks that it takes."""
        return self.tp * self.pp * self.dp * (1 if self.cp == "1" else 2)

    @property
    def name(self) -> str:
        """E.g. ``tp2-pp1-dp2-zero1-sp-ring2-ep2``."""
        split = "-sp" if self.sp else ""
        context = "" if self.cp == "1" else f"-{self.cp}2"
        experts = f"-ep{self.ep}" if self.ep else ""
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}-zero{self.zero}{split}{context}{experts}"

    @property
    def family(self) -> str:
        """Which model it trains: its reference is the one-rank run of the same."""
        return "moe" if self.ep else "dense"

    @property
    def keys(self) -> dict[str, Any]:
        """The keys of a run."""
        keys = FAMILIES[self.family] | {
            "model_parallel_size": self.tp,
            "pipe_parallel_size": self.pp,
            "sequence_parallel": self.sp,
            "zero_optimization": {"stage": self.zero} | (SMALL_ZERO_3 if self.zero == 3 else {}),
            "train_batch_size": BATCH,
            "train_micro_batch_size_per_gpu": MICRO_BATCH,
        }
        if self.cp != "1":
            keys |= {"context_parallel_size": 2, "context_parallel_kind": self.cp}
        if self.ep > 1:
            keys["expert_parallel_size"] = self.ep
        return keys

    def refusal(self) -> str | None:
        """The sentence with which the configuration refuses it, if it does."""
        try:
            config_from_keys({**KEYS, **self.keys}, world_size=self.ranks)
        except ConfigError as error:
            return str(error)
        return None


SMALL_ZERO_3 = {"stage3_param_persistence_threshold": 0}
"""A tiny model's parameters are divided and gathered like a large one's."""

DENSE: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8}
FAMILIES: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "moe": DENSE | {"moe_num_experts": 4, "moe_top_k": 2, "expert_interval": 1},
}
"""Heads for Ulysses over two of four tensor ranks, experts for each of four stages."""


def layouts() -> list[Layout]:
    """Every combination of up to MAX_RANKS ranks.

    A split sequence takes several tensor ranks, divided experts several replicas: without them there is
    nothing to combine.
    """
    products = (Layout(*values) for values in itertools.product(*DIMENSIONS.values()))
    return [
        layout
        for layout in products
        if layout.ranks <= MAX_RANKS
        and (layout.tp > 1 or not layout.sp)
        and layout.dp * (1 if layout.cp == "1" else 2) % max(1, layout.ep) == 0
    ]


def pairs(layout: Layout) -> set[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs of features that occur in ``layout``."""
    features = [(name, getattr(layout, name)) for name in DIMENSIONS]
    return set(itertools.combinations(features, 2))


def covering(candidates: Sequence[Layout]) -> list[Layout]:
    """Few of ``candidates`` in which every pair of features occurs that occurs in any: greedily the one that
    adds most pairs, of equals the one with fewest ranks, of those the first."""
    missing = set(itertools.chain(*map(pairs, candidates)))
    chosen: list[Layout] = []
    while missing:
        best = max(candidates, key=lambda layout: (len(pairs(layout) & missing), -layout.ranks))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


@dataclass(frozen=True)
class Verdict:
    """How far a layout is from one rank, relative: the worst loss, gradient norm and weight tensor (and which
    that is), and the worst kind of traffic from its formula."""

    loss: float
    norm: float
    weight: float
    tensor: str
    traffic: float

    @property
    def holds(self) -> bool:
        """Whether all is within the tolerances."""
        close = max(self.loss, self.norm) <= LOSS_TOLERANCE and self.weight <= WEIGHT_TOLERANCE
        return close and self.traffic <= TRAFFIC_TOLERANCE


def compare(layout: Layout, outcome: Outcome, reference: Outcome, folder: Path) -> Verdict:
    """``outcome`` and the weights in ``folder`` against the one-rank run's."""
    weights, expected = dict(read_weights(folder / layout.name)), dict(read_weights(folder / layout.family))
    assert weights.keys() == expected.keys()
    apart = {name: float(torch.dist(weights[name], whole) / whole.norm()) for name, whole in expected.items()}
    worst = max(apart, key=apart.__getitem__)
    return Verdict(
        max(map(_relative, outcome.losses, reference.losses)),
        max(map(_relative, outcome.norms, reference.norms)),
        apart[worst],
        worst if apart[worst] else "",
        traffic_error(layout, outcome),
    )


def _relative(value: float, expected: float) -> float:
    error = abs(value / expected - 1)
    return error if math.isfinite(error) else math.inf


def traffic_error(layout: Layout, outcome: Outcome) -> float:
    """The worst relative difference between bytes counted and by formula, of any kind but control."""
    config = config_from_keys({**KEYS, **layout.keys}, world_size=layout.ranks)
    formula = step_traffic(config, config.batch.gradient_accumulation_steps)
    counted = {kind: size for kind, size in outcome.traffic.items() if kind != "control"}
    if counted.keys() != formula.keys():
        return math.inf
    return max((_relative(counted[kind], formula[kind]) for kind in counted), default=0.0)


def verdicts(chosen: Iterable[Layout], folder: Path, steps: int = STEPS) -> Iterator[tuple[Layout, Verdict]]:
    """Each of ``chosen`` compared with the one-rank run of its model. ``folder`` takes checkpoints."""
    chosen = list(chosen)
    references: dict[str, Outcome] = {}
    for family in dict.fromkeys(layout.family for layout in chosen):
        keys = Layout().keys | FAMILIES[family]
        references[family] = outcomes([Case(family, keys, samples=(BATCH,), last=steps)], 1, folder)[0]
    for ranks in sorted({layout.ranks for layout in chosen}):
        group = [layout for layout in chosen if layout.ranks == ranks]
        for first in range(0, len(group), PER_CALL):
            part = group[first : first + PER_CALL]
            cases = [Case(each.name, each.keys, samples=(BATCH,), last=steps, counted=True) for each in part]
            told = outcomes(cases, ranks, folder)
            for layout, outcome in zip(part, told, strict=True):
                yield layout, compare(layout, outcome, references[layout.family], folder)
                shutil.rmtree(folder / layout.name)


def main() -> int:
    """Run the grid; 1 if a layout misses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--subset", action="store_true", help="only the layouts in which every pair occurs")
    parser.add_argument("--only", default="", metavar="REGEX", help="those in whose names this is found")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the table there")
    arguments = parser.parse_args()
    started, lines = time.monotonic(), []

    def tell(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    refused = {layout: layout.refusal() for layout in layouts()}
    valid = [layout for layout, sentence in refused.items() if sentence is None]
    chosen = covering(valid) if arguments.subset else valid
    chosen = [layout for layout in chosen if re.search(arguments.only, layout.name)]
    tell(f"{'layout':<36}{'ranks':>5}{'loss':>10}{'norm':>10}{'traffic':>10}{'weights':>10}  worst weight")
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for layout, verdict in verdicts(chosen, Path(scratch)):
            errors = (verdict.loss, verdict.norm, verdict.traffic, verdict.weight)
            figures = "".join(f"{error:10.1e}" for error in errors)
            miss = "" if verdict.holds else "  MISSED"
            tell(f"{layout.name:<36}{layout.ranks:5}{figures}  {verdict.tensor}{miss}")
            missed += not verdict.holds
    for layout, sentence in refused.items():
        if sentence is not None:
            tell(f"{layout.name:<36} refused: {sentence}")
    count = len(refused) - len(valid)
    minutes = (time.monotonic() - started) / 60
    tell(
        f"{len(chosen)} of {len(valid)} layouts run, {missed} missed, {count} refused, {minutes:.1f} minutes"
    )
    tell(
        f"Worst relative differences: from one rank (limits: loss and norm {LOSS_TOLERANCE}, weights "
        f"{WEIGHT_TOLERANCE}), and of the bytes sent from the formulas ({TRAFFIC_TOLERANCE})."
    )
    if arguments.write:
        arguments.write.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
