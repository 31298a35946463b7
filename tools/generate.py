"""Let a checkpoint write:

    generate.py runs/demo/checkpoints --prompt "def " --temperature 0.7
    deepy.py generate.py CONF.yml [MORE.yml ...] -i prompts.txt -o samples.jsonl

What is not given here comes from the keys of the run, or of the configuration: text_gen_type,
sample_input_file (without them a document is begun), sample_output_file, temperature, top_k, top_p,
maximum_tokens, num_samples. A configuration also says which checkpoint (``load``, or else ``save``, and
``iteration``) and how many ranks share the model (``model_parallel_size``).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_lite.checkpoint import find_checkpoint, read_config
from megatron_lite.config import config_from_keys
from megatron_lite.config.sections.generation import GenerationSection
from megatron_lite.generation import Sample, Sampling
from megatron_lite.generation.cli import add_model_arguments, choose_model, positive, prepare_output
from megatron_lite.generation.replicas import TextReplicas, load_replicas
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.training.meeting import meeting
from megatron_lite.utils.errors import DataError, command_line
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import setup_logging


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="text to continue; an empty one begins a document")
    prompts.add_argument("--prompt-file", type=Path, help="a file with one prompt a line")
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts until end of file")
    parser.add_argument("--num-samples", type=positive, help="continuations of each prompt")
    parser.add_argument("--max-new-tokens", type=positive, help="tokens of a continuation")
    parser.add_argument("--temperature", type=float, help="spread; 0 takes the likeliest token")
    parser.add_argument("--greedy", action="store_true", help="the same as --temperature 0")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest tokens; 0: among all")
    parser.add_argument(
        "--top-p", type=float, help="choose among the fewest tokens that hold this probability"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: tokens that occurred are less likely"
    )
    parser.add_argument(
        "--no-repeat-ngram-size", type=int, default=0, help="no n tokens in a row occur twice"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--batch-size", type=positive, default=8, help="texts written side by side")
    parser.add_argument("--output-file", type=Path, help="write the samples there, one JSON object a line")
    return parser.parse_args()


def choose_sampling(arguments: argparse.Namespace, keys: GenerationSection) -> Sampling:
    """The command line's choices, and the run's where it is silent."""
    given = {
        "temperature": 0.0 if arguments.greedy else arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
    }
    chosen = {name: getattr(keys, name) if value is None else value for name, value in given.items()}
    return Sampling(
        **chosen,
        repetition_penalty=arguments.repetition_penalty,
        no_repeat_ngram_size=arguments.no_repeat_ngram_size,
        seed=arguments.seed,
    )


def read_prompts(path: Path) -> list[str]:
    """The lines of ``path``."""
    try:
        with open(path, encoding="utf-8") as file:
            prompts = [line.rstrip("\n") for line in file]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}): convert it") from None
    if not prompts:
        raise DataError(f"{path} is empty: write one prompt a line")
    return prompts


@dataclass(frozen=True)
class Request:
    """What is to be written.

    Attributes:
        prompts: what is continued; None: a person is asked.
        sampling: how tokens are chosen.
        max_new_tokens: of each sample.
        num_samples: of each prompt.
        batch_size: samples that are written side by side.
        output: the file for them; None: they are shown.
    """

    prompts: list[str] | None
    sampling: Sampling
    max_new_tokens: int
    num_samples: int
    batch_size: int
    output: Path | None


def make_request(arguments: argparse.Namespace, keys: GenerationSection, is_first: bool) -> Request:
    """The command line's choices, and the keys' where it is silent; the first rank looks at files."""
    output: Path | None = arguments.output_file
    if output is None and keys.sample_output_file:
        output = Path(keys.sample_output_file)
    request = Request(
        choose_prompts(arguments, keys, is_first),
        choose_sampling(arguments, keys),
        arguments.max_new_tokens or keys.maximum_tokens,
        arguments.num_samples or keys.num_samples,
        arguments.batch_size,
        output,
    )
    if is_first and output is not None and request.prompts is not None:
        prepare_output(output)
    return request


def choose_prompts(
    arguments: argparse.Namespace, keys: GenerationSection, is_first: bool
) -> list[str] | None:
    """The prompts, of which a file's are for the first rank only; None asks a person."""
    if arguments.prompt is not None:
        return [arguments.prompt]
    file: Path | None = arguments.prompt_file
    if file is None:
        if arguments.interactive or keys.text_gen_type == "interactive":
            return None
        file = Path(keys.sample_input_file) if keys.sample_input_file else None
    if file is None:
        return [""]
    return read_prompts(file) if is_first else []


def typed_prompts(lines: Iterable[str], prompt_end: str) -> Iterator[str]:
    """The prompts in what a person types: each ends with ``prompt_end``."""
    text = ""
    for line in lines:
        text += line
        if text.endswith(prompt_end):
            yield text.removesuffix(prompt_end)
            text = ""
    if text:
        yield text


def converse(replicas: TextReplicas, request: Request) -> None:
    """Continue what is typed until end of file or Ctrl-C."""
    print("Type a prompt; Ctrl-D ends.", file=sys.stderr)
    prompts = typed_prompts(sys.stdin, replicas.model.config.generation.prompt_end)
    while (prompt := next_prompt(prompts)) is not None:
        show(replicas, prompt, request)


def next_prompt(prompts: Iterator[str]) -> str | None:
    """The next prompt that a person types; None at the end of file or after Ctrl-C."""
    try:
        return next(prompts, None)
    except KeyboardInterrupt:
        return None


def show(replicas: TextReplicas, prompt: str, request: Request) -> None:
    """Print ``prompt`` and its continuation as it comes."""
    print(prompt, end="", flush=True)
    replicas.stream(prompt, request.sampling, request.max_new_tokens)
    print("\n", flush=True)


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object a line: prompt, text, tokens, finished."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))
    print(f"wrote {len(samples)} samples to {path}")


def write(replicas: TextReplicas, request: Request) -> None:
    """Write what is asked for; rank 0 does this, the others do what it asks."""
    prompts = request.prompts
    if prompts is None:
        return converse(replicas, request)
    if request.output is None and len(prompts) == request.num_samples == 1:
        return show(replicas, prompts[0], request)
    samples = replicas.generate(
        prompts, request.sampling, request.max_new_tokens, request.num_samples, request.batch_size
    )
    if request.output is not None:
        return write_samples(list(samples), request.output)
    for sample in samples:
        print(f"{sample.prompt}{sample.text}\n---", flush=True)
    return None


@command_line
def main() -> None:
    """Check what is asked for, load the checkpoint, write."""
    arguments = parse_arguments()
    context = context_from_environment()
    setup_logging()
    model = choose_model(arguments, context.world_size)
    checkpoint = find_checkpoint(model.checkpoint, model.step)
    keys = (model.config or config_from_keys(read_config(checkpoint))).generation
    request = make_request(arguments, keys, context.is_first)
    if request.prompts is None and not context.is_first:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a person's Ctrl-C: rank 0 says what follows from it
    with meeting(context):
        replicas = load_replicas(
            context, checkpoint, None, DTYPES.get(arguments.dtype), model.tensor_ranks, keys
        )
        with replicas.team.led() as leads:
            if leads:
                write(replicas, request)


if __name__ == "__main__":
    sys.exit(main())
