"""The launcher's command line: read, check, say what will run, start the ranks."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_lite.config import Config, load_config
from megatron_lite.config.cli import COMMAND_VARIABLE, add_config_arguments, config_paths, typed_command
from megatron_lite.data.datasets import open_datasets
from megatron_lite.data.embedded import VOCAB_SIZE
from megatron_lite.data.prepare import prepare_data
from megatron_lite.data.sources import sources_of
from megatron_lite.launcher.environment import rank_environment
from megatron_lite.launcher.local import Share, start_ranks
from megatron_lite.launcher.multinode import start_on_hosts
from megatron_lite.launcher.placement import tell_of_torn_groups
from megatron_lite.launcher.plan import check_fits, run_summary, tokens_line
from megatron_lite.launcher.resources import Resources, find_resources, launcher_keys, with_chosen_gpus
from megatron_lite.launcher.torch_build import usable
from megatron_lite.planner import Machine, this_machine
from megatron_lite.utils.errors import ConfigError, command_line
from megatron_lite.utils.log import setup_logging

TRAINING_SCRIPT = "train.py"
"""The script whose needs the planner knows; another script is only given ranks."""

PROJECT = Path(__file__).resolve().parents[2]
NEOX_SCRIPTS = {"eval.py": "tools/evaluate.py", "generate.py": "tools/generate.py"}
"""GPT-NeoX's scripts that have another name here."""

KEY_OPTIONS = ("wandb_group", "wandb_team", "iteration", "eval_results_prefix")
"""GPT-NeoX's options that are another way to write ``--set KEY=VALUE``."""


@command_line
def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``deepy.py SCRIPT CONF ...``; return the exit status of the ranks, 2 when they were not started.

    A wrong key is answered in well under a second: neither torch nor DeepSpeed is imported before it.
    """
    options = _parser().parse_args(arguments)
    setup_logging()
    script = Path(options.script)
    if not script.is_file() and options.script in NEOX_SCRIPTS:
        script = PROJECT / NEOX_SCRIPTS[options.script]
    if not script.is_file():
        raise ConfigError(f"there is no script {script}; it is the first argument, for example train.py")
    paths = config_paths(options.config_files, options.conf_dir)
    overrides = [*options.overrides, *_key_overrides(options)]
    machine = usable(this_machine())
    keys = launcher_keys(paths, overrides)
    resources = find_resources(keys, machine)
    machine = with_chosen_gpus(machine, resources)
    config = load_config(paths, overrides, world_size=resources.ranks)
    if script.name == TRAINING_SCRIPT:
        tell_of_torn_groups(config, {host: len(slots) for host, slots in resources.hosts.items()})
        print(_plan(config, machine, resources, options.force), flush=True)
    words = [*(str(path) for path in paths), *(["--set", *overrides] if overrides else [])]
    if resources.several:
        return start_on_hosts(keys, resources, str(script), words)
    return start_ranks(
        [sys.executable, str(script), *words],
        resources.ranks_here,
        _environment(resources, machine),
        keys.master_port,
        _share(resources),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepy.py",
        description="Start SCRIPT on every accelerator of this machine, or of the hosts of a hostfile.",
    )
    parser.add_argument("script", metavar="SCRIPT", help="the Python file that each rank runs, e.g. train.py")
    add_config_arguments(parser)
    parser.add_argument("-H", "--hostfile", metavar="FILE", help="`host slots=N` lines; the key hostfile")
    parser.add_argument("-i", "--sample_input_file", metavar="FILE", help="the key of this name")
    parser.add_argument("-o", "--sample_output_file", metavar="FILE", help="the key of this name")
    for name in KEY_OPTIONS:
        parser.add_argument(f"--{name}", metavar="VALUE", help="the key of this name")
    parser.add_argument("--eval_tasks", nargs="+", metavar="TASK", help="the key of this name")
    parser.add_argument("--force", action="store_true", help="start even if the memory does not seem enough")
    return parser


def _key_overrides(options: argparse.Namespace) -> list[str]:
    """The options that stand for keys, as ``key=value``."""
    names = ("hostfile", "sample_input_file", "sample_output_file", *KEY_OPTIONS)
    given = {name: getattr(options, name) for name in names}
    tasks = [] if options.eval_tasks is None else [f"eval_tasks={json.dumps(options.eval_tasks)}"]
    return [*(f"{name}={value}" for name, value in given.items() if value is not None), *tasks]


def _plan(config: Config, machine: Machine, resources: Resources, force: bool) -> str:
    """Get the data ready; the summary of the run. Raises ConfigError when this machine is too small.

    The memory is checked before the embedded default data is built, which takes minutes the first time.
    """
    ranks_here = resources.ranks_here
    is_checked = not resources.several and not force
    names_data = bool(sources_of(config.data, "train"))
    if is_checked and config.model.vocab_size is None and not names_data:
        check_fits(config.with_keys(vocab_size=VOCAB_SIZE), machine, ranks_here)
    config = prepare_data(config)
    if is_checked:
        check_fits(config, machine, ranks_here)
    page = run_summary(config, machine, ranks_here, resources.several)
    # The hosts' files may not be here. On this machine, a missing, damaged or foreign file is found now,
    # once, and not in every rank.
    if resources.several:
        return page
    datasets = open_datasets(config)
    datasets.look_at_samples()
    return f"{page}\n{tokens_line(datasets)}"


def _share(resources: Resources) -> Share | None:
    """The ranks of this pod among those of its job."""
    pods, here = resources.pods, resources.ranks_here
    return Share(pods.index * here, resources.ranks, pods.address, pods.port) if pods else None


def _environment(resources: Resources, machine: Machine) -> dict[str, str]:
    """The environment of this machine's ranks."""
    slots = next(iter(resources.hosts.values())) if resources.chosen else None
    return {**rank_environment(machine, resources.ranks_here, slots), COMMAND_VARIABLE: typed_command()}
