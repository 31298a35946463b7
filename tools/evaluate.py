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
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lite.evaluation import Choice, Replicas, open_replicas
from megatron_lite.evaluation.run import BATCH_TOKENS
from megatron_lite.evaluation.tasks import find_tasks, stay_offline, table
from megatron_lite.generation.cli import (
    ChosenModel,
    add_model_arguments,
    choose_model,
    positive,
    prepare_output,
)
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.training.meeting import meeting
from megatron_lite.utils.errors import ConfigError, command_line
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import setup_logging

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--tasks", "--eval_tasks", nargs="+", default=[], help="names, with commas or spaces")
    parser.add_argument("--include-path", type=Path, help="a folder with task files of your own")
    parser.add_argument("--num-fewshot", type=int, help="solved examples before each question")
    parser.add_argument("--limit", type=positive, help="documents of each task at most, for a trial")
    parser.add_argument("--text", nargs="+", default=[], help="files: perplexity and bits per byte")
    parser.add_argument("--text-key", default="text", help="the key of the text in JSONL (default: text)")
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument(
        "--batch-tokens", type=positive, default=BATCH_TOKENS, help="tokens of a batch (default: 8192)"
    )
    parser.add_argument("--offline", action="store_true", help="never look for data in the network")
    return parser.parse_args()


@dataclass(frozen=True)
class Plan:
    """What is evaluated on what, and where the results go."""

    model: ChosenModel
    tasks: tuple[str, ...]
    output: Path | None


def make_plan(arguments: argparse.Namespace, world_size: int) -> Plan:
    """From the command line alone, or from a configuration and what the command line says otherwise."""
    model = choose_model(arguments, world_size)
    tasks = tuple(name for word in arguments.tasks for name in word.split(",") if name)
    if model.config is None:
        return Plan(model, tasks, arguments.output)
    keys = model.config.evaluation
    prefix = f"{keys.eval_results_prefix}_" if keys.eval_results_prefix else ""
    dated = Path(f"{prefix}eval_results_{datetime.now():%m-%d-%Y-%H-%M-%S}.json")
    return Plan(model, tasks or tuple(keys.eval_tasks or ()), arguments.output or dated)


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
    plan = make_plan(arguments, context.world_size)
    if not plan.tasks and not arguments.text:
        raise ConfigError("there is nothing to evaluate: give --tasks (the key eval_tasks) or --text")
    choice = Choice(plan.tasks, arguments.include_path, arguments.num_fewshot, arguments.limit)
    manager = find_tasks(choice) if context.is_first and plan.tasks else None
    if context.is_first and plan.output is not None:
        prepare_output(plan.output)
    with meeting(context):
        replicas = open_replicas(
            context, plan.model.checkpoint, plan.model.step, DTYPES.get(arguments.dtype),
            plan.model.tensor_ranks, arguments.batch_tokens,
        )  # fmt: skip
        with replicas.team.led() as leads:
            if leads:
                evaluate(replicas, plan, arguments, choice, manager)


if __name__ == "__main__":
    sys.exit(main())
