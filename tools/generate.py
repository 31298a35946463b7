"""Let a checkpoint write: ``generate.py runs/demo/checkpoints --prompt "def " --temperature 0.7``.

What is not given here comes from the run: its keys text_gen_type, sample_input_file (without them a document
is begun), sample_output_file, temperature, top_k, top_p, maximum_tokens, num_samples.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from megatron_lite.config.sections.generation import GenerationSection
from megatron_lite.generation import Sample, Sampling, TextModel, generate, load_model, stream
from megatron_lite.parallel.context import context_from_environment
from megatron_lite.parallel.parameter import DTYPES
from megatron_lite.utils.errors import DataError, command_line
from megatron_lite.utils.files import write_text
from megatron_lite.utils.log import setup_logging


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a folder of checkpoints")
    parser.add_argument(
        "--iteration", type=int, help="step of the checkpoint in the folder (default: the latest)"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="text to continue; an empty one begins a document")
    prompts.add_argument("--prompt-file", type=Path, help="a file with one prompt a line")
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts until end of file")
    parser.add_argument("--num-samples", type=_positive, help="continuations of each prompt")
    parser.add_argument("--max-new-tokens", type=_positive, help="tokens of a continuation")
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
    parser.add_argument("--batch-size", type=_positive, default=8, help="texts written side by side")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="to compute in (default: the run's on a GPU, fp32 on a CPU)"
    )
    parser.add_argument("--output-file", type=Path, help="write the samples there, one JSON object a line")
    return parser.parse_args()


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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


def configured_prompts(keys: GenerationSection) -> list[str] | None:
    """Where the run's keys say that prompts come from; None asks a person."""
    if keys.text_gen_type == "interactive":
        return None
    return read_prompts(Path(keys.sample_input_file)) if keys.sample_input_file else [""]


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


def converse(model: TextModel, sampling: Sampling, max_new_tokens: int) -> None:
    """Continue what is typed until end of file or Ctrl-C."""
    print("Type a prompt; Ctrl-D ends.", file=sys.stderr)
    with suppress(KeyboardInterrupt):
        for prompt in typed_prompts(sys.stdin, model.config.generation.prompt_end):
            show(model, prompt, sampling, max_new_tokens)


def show(model: TextModel, prompt: str, sampling: Sampling, max_new_tokens: int) -> None:
    """Print ``prompt`` and its continuation as it comes."""
    print(prompt, end="", flush=True)
    for piece in stream(model, prompt, sampling, max_new_tokens):
        print(piece, end="", flush=True)
    print("\n")


def write_samples(samples: Sequence[Sample], path: Path) -> None:
    """One JSON object a line: prompt, text, tokens, finished."""
    write_text(path, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples))
    print(f"wrote {len(samples)} samples to {path}")


@command_line
def main() -> None:
    """Load the checkpoint and write."""
    arguments = parse_arguments()
    setup_logging()
    prompts = [arguments.prompt] if arguments.prompt is not None else None
    if arguments.prompt_file:
        prompts = read_prompts(arguments.prompt_file)
    device = context_from_environment().device
    dtype = DTYPES[arguments.dtype] if arguments.dtype else None
    model = load_model(arguments.checkpoint, device, dtype, arguments.iteration)
    keys = model.config.generation
    sampling = choose_sampling(arguments, keys)
    max_new_tokens = arguments.max_new_tokens or keys.maximum_tokens
    num_samples = arguments.num_samples or keys.num_samples
    if prompts is None and not arguments.interactive:
        prompts = configured_prompts(keys)
    if prompts is None:
        return converse(model, sampling, max_new_tokens)
    output: Path | None = arguments.output_file
    if output is None and keys.sample_output_file:
        output = Path(keys.sample_output_file)
    if output is None and len(prompts) == num_samples == 1:
        return show(model, prompts[0], sampling, max_new_tokens)
    samples = generate(model, prompts, sampling, max_new_tokens, num_samples, arguments.batch_size)
    if output is not None:
        return write_samples(list(samples), output)
    for sample in samples:
        print(f"{sample.prompt}{sample.text}\n---")
    return None


if __name__ == "__main__":
    sys.exit(main())
