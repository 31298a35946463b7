"""YAML files and ``key=value`` words into keys that remember where they were written."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_lite.utils.errors import ConfigError


@dataclass(frozen=True)
class Entry:
    """One key as somebody wrote it.

    Attributes:
        key: with underscores; a dotted key reaches into a block (``optimizer.params.lr``).
        value: what YAML makes of it.
        origin: ``file:line``, or ``--set``; empty when the key came from code.
        inner: the origins of the keys within a block, by their dotted names.
    """

    key: str
    value: Any
    origin: str = ""
    inner: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str = "") -> str:
        """How a message begins that is about this entry, or about ``key`` within it."""
        origin = self.inner.get(key, self.origin)
        return f"{origin}: " if origin else ""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader that reads ``6e-4`` as a number (YAML 1.2) and refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping of ``node``, when no key is there twice."""
        seen: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in seen:
                raise ConfigError(
                    f"{key.start_mark.name}:{line}: {key.value} is given twice, first on line {seen[name]}; "
                    "keep one (- and _ are the same in a key)"
                )
            seen[name] = line
        return super().construct_mapping(node, deep)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | int:
    """``5e8`` and ``1000.0`` may be counts; where a fraction is wanted, a whole number will do as well."""
    value = loader.construct_yaml_float(node)
    return int(value) if value.is_integer() else value


class _Dumper(yaml.SafeDumper):
    """Its counterpart: a text that looks like such a number is quoted."""


FLOAT = "tag:yaml.org,2002:float"
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        FLOAT, re.compile(r"^[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
_Loader.add_constructor(FLOAT, _number)
_Loader.yaml_implicit_resolvers = {  # no key is a date: 2026-01-31 is the name of a run
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:timestamp"]
    for first, pairs in _Loader.yaml_implicit_resolvers.items()
}


def to_yaml(keys: Mapping[str, Any]) -> str:
    """``keys`` as YAML that :func:`read_file` reads as the same values."""
    # All beyond ASCII is escaped: PyYAML writes some Unicode line breaks raw, and reads them as spaces.
    return yaml.dump(dict(keys), Dumper=_Dumper, sort_keys=False)


def read_file(path: Path) -> list[Entry]:
    """The keys of a YAML (or JSON) file, in order.

    Raises :class:`ConfigError` when the file is missing, is not a map of keys, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file (byte {error.start} is not UTF-8)") from error
    return list(_entries(text, str(path)))


def _entries(text: str, name: str) -> Iterator[Entry]:
    loader = _Loader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            return
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{name} is not a configuration: a map of keys to values is expected")
        values = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{name}:{line}: this is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: this is not YAML: {error}") from error
    finally:
        loader.dispose()
    nodes = {key.value: (key, value) for key, value in node.value}
    for key, value in values.items():
        if not isinstance(key, str):
            raise ConfigError(f"{name}: the key {key!r} is not a name")
        key_node, value_node = nodes[key]
        root = normal_key(key)
        origin = f"{name}:{key_node.start_mark.line + 1}"
        yield Entry(root, value, origin, dict(_origins(value_node, root, name)))


def _origins(node: yaml.Node, path: str, name: str) -> Iterator[tuple[str, str]]:
    """The dotted names within the block ``node`` and where they are."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}"
            yield inner, f"{name}:{key.start_mark.line + 1}"
            yield from _origins(value, inner, name)


def read_override(word: str) -> Entry:
    """The key of a ``key=value`` word from the command line; the value is read as YAML."""
    key, equals, text = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {word}: expected key=value, for example --set train_iters=100")
    loader = _Loader(text)
    try:
        value = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {word}: the value is not YAML") from error
    finally:
        loader.dispose()
    return Entry(normal_key(key.strip()), value, "--set")


def normal_key(key: str) -> str:
    """``key`` with underscores for dashes."""
    return key.replace("-", "_")
