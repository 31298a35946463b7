"""Tasks of lm-eval, run on a model: their names, their data, their figures."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_lite.config.inner_keys import nearest
from megatron_lite.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from megatron_lite.evaluation.harness import HarnessModel

INSTALL = "python -m pip install --constraint constraints.txt -r requirements-eval.txt"
PYTHON_SEED, OTHER_SEEDS = 0, 1234
"""lm-eval's own defaults, so that the same examples are chosen as everywhere."""

BOOTSTRAPS = 10_000
"""Draws for the standard error of figures that have no formula for it. Ten times as many take half a minute a
task."""


@dataclass(frozen=True)
class Choice:
    """What is run.

    Attributes:
        tasks: names of tasks, groups or tags of lm-eval, or paths of task files.
        include_path: folder with task files of one's own, which come before those of the same name.
        num_fewshot: solved examples before each question; None: as the task says.
        limit: documents of each task at most; None: all.
    """

    tasks: Sequence[str]
    include_path: Path | None = None
    num_fewshot: int | None = None
    limit: int | None = None


def require_lm_eval() -> None:
    """Raise :class:`ConfigError` with the command that installs lm-eval, unless it is there."""
    if find_spec("lm_eval") is None:
        raise ConfigError(f"tasks need the package lm-eval, which is not installed: run `{INSTALL}`")


def find_tasks(choice: Choice) -> TaskManager:
    """lm-eval's index of tasks, in which all of ``choice`` are.

    Reading the thousands of files that come with lm-eval takes seconds; it is left out where the tasks are
    files, or in the include path.

    Raises:
        ConfigError: there is no task, or no folder, of such a name; or lm-eval is not installed.
    """
    require_lm_eval()
    from lm_eval.tasks import TaskManager

    folder = choice.include_path
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no folder {folder} to take tasks from")
    names = [name for name in choice.tasks if not Path(name).is_file()]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    own = TaskManager(include_path=folder, include_defaults=False)
    if set(names) <= set(own.all_subtasks) and not any(map(_is_group, choice.tasks)):
        return own
    manager = TaskManager(include_path=folder)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        hint = nearest(unknown[0], manager.all_tasks)
        hint = hint or "; `python -m lm_eval ls tasks` lists those of lm-eval"
        raise ConfigError(f"there is no task {unknown[0]}{hint}")
    return manager


def _is_group(name: str) -> bool:
    """Whether ``name`` is a file that names a group of tasks, which may be any."""
    path = Path(name)
    return path.is_file() and re.search("^group:", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def run_tasks(model: HarnessModel, manager: TaskManager, choice: Choice) -> dict[str, Any]:
    """lm-eval's results for ``choice``, of which ``manager`` knows the tasks, as JSON knows them.

    Raises:
        ConfigError: a task runs code that the model wrote.
        DataError: the data of a task cannot be had.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable

    random.seed(PYTHON_SEED)
    np.random.seed(OTHER_SEEDS)
    torch.manual_seed(OTHER_SEEDS)
    try:
        found = manager.load(list(choice.tasks))
    except OSError as error:
        raise DataError(
            f"the data of {', '.join(choice.tasks)} cannot be had ({str(error).splitlines()[0]}): connect to "
            "the network once, or give tasks that read local files (docs/evaluation.md)"
        ) from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{name} runs code that the model wrote, which is not offered here")
        _set_examples(task, choice.num_fewshot)
    results = evaluate(model, found, limit=choice.limit, log_samples=False, bootstrap_iters=BOOTSTRAPS)
    assert results is not None, "lm-eval takes this rank for the only one"
    # Functions in a task's description become their names.
    return json.loads(json.dumps(results, default=handle_non_serializable))


def _set_examples(task: Any, num_fewshot: int | None) -> None:
    """How many solved examples ``task`` shows; a task that is made for none, by its file, shows none."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=OTHER_SEEDS)


def table(results: Mapping[str, Any]) -> str:
    """lm-eval's tables of the tasks and, where there are any, of the groups."""
    from lm_eval.utils import make_table

    parts = ["results", *(["groups"] if results.get("groups") else [])]
    return "\n".join(make_table(results, part) for part in parts)


def stay_offline() -> None:
    """Let the libraries that load data look at local files only, where there is no network to wait for."""
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
