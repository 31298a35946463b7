"""Keys of downstream evaluation."""

from __future__ import annotations

from megatron_lite.config.fields import Section, Text


class EvaluationSection(Section):
    """What `tools/evaluate.py` asks a trained model. Training does not look at these keys."""

    eval_tasks: list[Text] | None = None
    """Tasks of lm-eval, by name or as paths of task files."""
    eval_results_prefix: str = ""
    """The results are written to `PREFIX_eval_results_DATE.json`."""
