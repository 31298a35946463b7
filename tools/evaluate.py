"""Evaluate a checkpoint on tasks of lm-eval, or on a text:

    evaluate.py runs/demo/checkpoints --tasks lambada_openai,hellaswag --output scores.json
    evaluate.py runs/demo/checkpoints --text held-out.jsonl
    deepy.py tools/evaluate.py CONF.yml [MORE.yml ...] --eval_tasks lambada_openai hellaswag

With a configuration instead of a checkpoint its keys say the rest: ``load`` (or else ``save``) and
``iteration`` which checkpoint, ``model_parallel_size`` how many ranks share the model, ``eval_tasks`` and
``eval_results_prefix``.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.config import load_config
from megatron_lite.evaluation import Choice, Replicas, open_replicas
from megatron_lite.evaluation.run import BATCH_TOKENS
from megatron_lite.evaluation.tasks import find_tasks, stay_offline, table
from megatron_lite.parallel.context import ParallelContext, context_from_environment
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import ConfigError, command_line
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import setup_logging

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PATIENCE_SECONDS = 24 * 3600.0
"""How long ranks wait for rank 0, which may have to load data or compute figures in between."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "of", nargs="+", type=Path, help="a checkpoint, a folder of checkpoints, or YAML files"
    )
    parser.add_argument("--tasks", "--eval_tasks", nargs="+", default=[], help="names, with commas or spaces")
    parser.add_argument("--include-path", type=Path, help="a folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="solved examples before each question")
    parser.add_argument("--limit", type=_positive, help="documents of each task at most, for a trial")
    parser.add_argument("--text", nargs="+", default=[], help="files: perplexity and bits per byte")
    parser.add_argument("--text-key", default="text", help="the key of the text in JSONL (default: text)")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--iteration", type=int, help="step of the checkpoint (default: the latest)")
    parser.add_argument("--model-parallel-size", type=_positive, help="ranks that share the model")
    parser.add_argument(
        "--batch-tokens", type=_positive, default=BATCH_TOKENS, help="tokens of a batch (default: 8192)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (default: the run's on a GPU, fp32 on a CPU)"
    )
    parser.add_argument("--offline", action="store_true", help="never look for data in the network")
    parser.add_argument(
        "--set", dest="overrides", nargs="+", action="extend", default=[], metavar="KEY=VALUE"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


@dataclass(frozen=True)
class Plan:
    """What is evaluated on what, and where the results go."""

    checkpoint: Path
    step: int | None
    tensor_ranks: int
    tasks: tuple[str, ...]
    output: Path | None


def make_plan(arguments: argparse.Namespace, context: ParallelContext) -> Plan:
    """From the command line alone, or from a configuration and what the command line says otherwise."""
    tasks = tuple(name for word in arguments.tasks for name in word.split(",") if name)
    plan = Plan(
        arguments.of[0], arguments.iteration, arguments.model_parallel_size or 1, tasks, arguments.output
    )
    if arguments.of[0].suffix not in (".yml", ".yaml", ".json"):
        if len(arguments.of) > 1 or arguments.overrides:
            raise ConfigError(
                f"{arguments.of[0]} is not a YAML file: give one checkpoint, or YAML files only"
            )
        return plan
    config = load_config(arguments.of, arguments.overrides, world_size=context.world_size)
    keys = config.evaluation
    folder = config.checkpoint.load or config.checkpoint.save
    if folder is None:
        raise ConfigError("load is not given: say which checkpoint is evaluated")
    prefix = f"{keys.eval_results_prefix}_" if keys.eval_results_prefix else ""
    return replace(
        plan,
        checkpoint=Path(folder),
        step=config.checkpoint.iteration if plan.step is None else plan.step,
        tensor_ranks=arguments.model_parallel_size or config.parallel.model_parallel_size,
        tasks=tasks or tuple(keys.eval_tasks or ()),
        output=plan.output or Path(f"{prefix}eval_results_{datetime.now():%m-%d-%Y-%H-%M-%S}.json"),
    )


def meeting(context: ParallelContext) -> AbstractContextManager[None]:
    """Within: the ranks can talk. A single one has no need to, and starts seconds earlier."""
    if context.world_size == 1:
        return nullcontext()
    from megatron_lite.training.distributed import distributed

    return distributed(context, PATIENCE_SECONDS)


def evaluate(
    replicas: Replicas,
    plan: Plan,
    arguments: argparse.Namespace,
    choice: Choice,
    manager: TaskManager | None,
) -> None:
    """Print the figures, and write them; rank 0 does this, the others do what it asks."""
    results: dict[str, object] = {"checkpoint": str(replicas.checkpoint)}
    if arguments.text:
        figures = replicas.text(arguments.text, arguments.text_key)
        print(figures.line(), flush=True)
        results["text"] = {"files": arguments.text} | figures.as_dict()
    if manager is not None:
        found = replicas.tasks(manager, choice)
        print(table(found), flush=True)
        results |= found
    if plan.output is not None:
        write_text(plan.output, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {plan.output}")


@command_line
def main() -> None:
    """Check what is asked for, load the checkpoint, evaluate."""
    arguments = parse_arguments()
    context = context_from_environment()
    setup_logging()
    if arguments.offline:
        stay_offline()
    plan = make_plan(arguments, context)
    if not plan.tasks and not arguments.text:
        raise ConfigError("there is nothing to evaluate: give --tasks (the key eval_tasks) or --text")
    choice = Choice(plan.tasks, arguments.include_path, arguments.num_fewshot, arguments.limit)
    manager = find_tasks(choice) if context.is_first and plan.tasks else None
    if context.is_first and plan.output is not None:
        if plan.output.is_dir():
            raise ConfigError(f"--output {plan.output} is a folder: name a file")
        plan.output.parent.mkdir(parents=True, exist_ok=True)
    with meeting(context):
        replicas = open_replicas(
            context, plan.checkpoint, plan.step, DTYPES.get(arguments.dtype), plan.tensor_ranks,
            arguments.batch_tokens,
        )  # fmt: skip
        with replicas.team.led() as leads:
            if leads:
                evaluate(replicas, plan, arguments, choice, manager)


if __name__ == "__main__":
    sys.exit(main())
