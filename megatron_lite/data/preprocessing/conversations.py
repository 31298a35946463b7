"""Prompts with answers, and chats, as pieces of text of which the answers are to be learned."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from megatron_lite.data.preprocessing.transforms import BadRecord
from megatron_lite.utils.errors import DataError

Segment = tuple[str, bool]
"""A piece of text, and whether it is to be learned."""


@dataclass(frozen=True)
class ConversationSettings:
    """How a record becomes segments.

    Attributes:
        messages: keys of a chat, of which the first that a record has is taken: a list of messages with
            ``role`` and ``content``.
        forms: (keys of the prompt, key of the answer), of which the first that a record has is taken. The
            parts of a prompt that are there are joined by a newline.
        separator: text between prompt and answer, learned with the answer. Not with a template.
        template: chat template (Jinja); None: chats cannot be read, and prompts stand as they are.
        variables: (name, text) of the special tokens that the template may use, such as ``bos_token``.
        role: who gives the answers.
        only_last: learn a chat's last answer only.
        all_text: learn everything.
    """

    messages: tuple[str, ...] = ("messages", "conversation")
    forms: tuple[tuple[tuple[str, ...], str], ...] = ((("prompt",), "completion"), (("src_txt",), "tgt_txt"))
    separator: str = ""
    template: str | None = None
    variables: tuple[tuple[str, str], ...] = ()
    role: str = "assistant"
    only_last: bool = False
    all_text: bool = False

    @property
    def columns(self) -> list[str]:
        """All keys that are looked at."""
        prompts = [key for keys, _ in self.forms for key in keys]
        return [*self.messages, *prompts, *(answer for _, answer in self.forms)]


def segments_of(record: Any, settings: ConversationSettings) -> list[Segment]:
    """The segments of ``record``, in order; not all of them are empty.

    ``src_txt`` without ``tgt_txt`` is text to be learned as a whole (fine-tuning by continuation).

    Raises:
        BadRecord: the record has no form that is known, or nothing to be learned.
    """
    if not isinstance(record, dict):
        raise BadRecord(f"not a JSON object but {type(record).__name__}: write one object a line")
    chats = [key for key in settings.messages if record.get(key) is not None]
    segments = of_chat(record[chats[0]], settings, chats[0]) if chats else of_pair(record, settings)
    if settings.all_text:
        segments = [(text, True) for text, _ in segments]
    if not any(text for text, learned in segments if learned):
        raise BadRecord(f"there is no answer to learn (no text of the role {settings.role!r}): leave it out")
    return segments


def of_pair(record: Mapping[str, Any], settings: ConversationSettings) -> list[Segment]:
    """The segments of a prompt and its answer."""
    for keys, answer_key in settings.forms:
        parts = [record[key] for key in keys if record.get(key) not in (None, "")]
        answer = record.get(answer_key)
        if not parts or not all(isinstance(part, str) for part in parts):
            continue
        prompt = "\n".join(parts)
        if isinstance(answer, str) and settings.template is not None:
            turns = [{"role": "user", "content": prompt}, {"role": settings.role, "content": answer}]
            return of_chat(turns, settings)
        if isinstance(answer, str):
            return [(prompt, False), (settings.separator + answer, True)]
        if answer is None and answer_key == "tgt_txt":
            return [(prompt, True)]
    known = [*settings.messages, *(f"{' + '.join(keys)} with {answer}" for keys, answer in settings.forms)]
    raise BadRecord(
        f"there is no text under any of {'; '.join(known)} (keys: {', '.join(record)}): name the keys, or "
        "correct the input"
    )


def of_chat(messages: Any, settings: ConversationSettings, key: str = "messages") -> list[Segment]:
    """The segments of a chat, found under ``key``, as its template renders it.

    An answer is what rendering one message more adds to the chat so far with the template's invitation to
    answer: its end-of-turn token is learned, its header is not.
    """
    if settings.template is None:
        raise BadRecord("a chat needs a template: give --chat-template, or a tokenizer that brings one")
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and "role" in turn and "content" in turn for turn in messages
    ):
        raise BadRecord(f"{key} is not a list of objects with role and content: correct it")
    render = renderer(settings.template, settings.variables)
    whole = render(messages, False)
    answers = [number for number, turn in enumerate(messages) if turn["role"] == settings.role]
    segments: list[Segment] = []
    done = 0
    for number in answers[-1:] if settings.only_last else answers:
        before = render(messages[:number], True)
        after = render(messages[: number + 1], False)
        if not (whole.startswith(after) and after.startswith(before)) or len(before) < done:
            raise BadRecord(
                f"the chat template renders message {number + 1} otherwise when others follow, so that its "
                "answer cannot be told apart: learn all with --no-mask, or give another --chat-template"
            )
        segments += [(whole[done : len(before)], False), (whole[len(before) : len(after)], True)]
        done = len(after)
    return [*segments, (whole[done:], False)]


@cache
def renderer(template: str, variables: tuple[tuple[str, str], ...]) -> Callable[[Sequence[Any], bool], str]:
    """(messages, whether to invite an answer) → text, as transformers' ``apply_chat_template`` renders it.

    In Jinja's sandbox: templates come from strangers. There is no ``strftime_now``, without which templates
    write a fixed date: the same input gives the same files on any day.

    Raises:
        DataError: the template is none. The function raises BadRecord for messages it refuses.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, GenerationTag]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(template)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template is not a Jinja template ({error}): correct it") from None

    def render(messages: Sequence[Any], invites: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=invites, **dict(variables))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BadRecord(f"the chat template refuses the messages ({error}): correct them") from None

    return render


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` … ``{% endgeneration %}``, by which templates may mark answers: only its content
    is rendered, since answers are found without it."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    """What templates call ``raise_exception``."""
    raise jinja2.TemplateError(message)


def template_beside(vocab_file: str | None) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    """(chat template, special tokens by name) that a tokenizer's folder brings in ``chat_template.jinja`` or
    ``tokenizer_config.json``; (None, ()) if there is neither."""
    if vocab_file is None:
        return None, ()
    path = Path(vocab_file)
    folder = path if path.is_dir() else path.parent
    keys: dict[str, Any] = {}
    if (folder / "tokenizer_config.json").is_file():
        try:
            keys = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{folder / 'tokenizer_config.json'} is not JSON ({error}): correct it") from None
    template = keys.get("chat_template")
    if isinstance(template, list):
        template = {each["name"]: each["template"] for each in template}.get("default")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    special = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = keys.get(name)
        special[name] = token.get("content") if isinstance(token, dict) else token
    return template, tuple((name, token) for name, token in special.items() if isinstance(token, str))
