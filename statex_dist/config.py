"""Typed configuration: dataclass trees read from YAML and dotted command-line overrides.

The work is jsonargparse's; this file adds what users of a cluster job need on top: an unknown key is reported with its
full path and the names that are allowed there, and every failure is a one-line :class:`ConfigError`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import math
import re
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml

from statex_dist.errors import ConfigError, one_line, reason, shown
from statex_dist.redact import redact, redacted, remember_all, remember_found

T = TypeVar("T")


def _dataclass_of(annotation: Any) -> type | None:
    """Return the dataclass in ``annotation`` (itself, or inside an ``X | None``), or None."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return next((found for arg in typing.get_args(annotation) if (found := _dataclass_of(arg))), None)
    return None


def check_keys(cls: type, values: Any, *, path: str = "", source: str = "config") -> None:
    """Raise if ``values`` holds a key that ``cls`` does not have, at any depth.

    Args:
        cls: Dataclass that describes the section.
        values: Parsed YAML of the section.
        path: Dotted path of the section, for the message.
        source: Name of the file, for the message.

    Raises:
        ConfigError: An unknown key (named by its full path), or a section that is not a mapping.
    """
    if values is None:
        return
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: '{path or 'the file'}' must be a mapping of keys to values, not {shown(values)}")
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        full = f"{path}.{key}" if path else str(key)
        if key not in hints:
            raise ConfigError(f"{source}: unknown key '{full}'; allowed here: {', '.join(sorted(hints))}")
        if value is not None and (section := _dataclass_of(hints[key])):
            check_keys(section, value, path=full, source=source)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8-sig")
        remember_found(text)  # errors quote parts of a line
        return yaml.safe_load(text)
    except FileNotFoundError:
        raise ConfigError(f"config file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {reason(error)}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"config file {path} is not valid YAML: {reason(error)}") from None


def parse_config(cls: type[T], argv: Sequence[str], *, prog: str, description: str = "") -> T:
    """Read a configuration from command-line arguments.

    ``--config FILE.yaml`` gives values, ``--section.key value`` overrides them in the order given, and
    ``--print_config`` prints the result.

    Args:
        cls: Dataclass to build.
        argv: Arguments without the program's name.
        prog: Program name for ``--help``.
        description: First line of ``--help``.

    Returns:
        An instance of ``cls``.

    Raises:
        ConfigError: Unknown key, wrong type, missing required value or unreadable file.
    """
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with the values below.")
    parser.add_class_arguments(cls)
    files = [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == "--config"]
    files += [arg.removeprefix("--config=") for arg in argv if arg.startswith("--config=")]
    for file in files:
        if (values := _read_yaml(Path(file))) is None:
            raise ConfigError(f"config file {file} holds no keys")
        remember_all(values)
        check_keys(cls, values, source=file)
    argv = _join_nested(cls, argv)
    remember_all(list(argv))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            namespace = parser.parse_args(list(argv))
        remember_all(namespace.as_dict())
        values = parser.instantiate(namespace).as_dict()
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        advice = "; --print_config shows every setting" if "unrecognized arguments" in str(error) else ""
        raise ConfigError(f"{prog}: {one_line(error)}{advice}") from None
    finally:
        sys.stdout.write(redact(printed.getvalue()))  # of --print_config and --help
    values.pop("config", None)
    return cls(**values)


def _join_nested(cls: type, argv: Sequence[str]) -> list[str]:
    """Return the arguments with every ``--mapping.key.deeper value`` replaced by one for the whole ``--mapping.key``.

    jsonargparse would replace all of ``mapping.key`` by this one value, and take the value for a string.

    Args:
        cls: Dataclass to build; only keys of its mappings are replaced.
        argv: Arguments, in order.
    """
    known: dict[str, Any] = {name: {} for name in _mappings(cls)}
    result: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        option, equals, text = argument.partition("=")
        path = option.removeprefix("--")
        mapping = next((m for m in known if path == m or path.startswith(f"{m}.")), None)
        if not option.startswith("--") or (mapping is None and path != "config"):
            result.append(argument)
            continue
        text = text if equals else next(arguments, "")
        if mapping is None:
            values = _read_yaml(Path(text))
            known |= {name: found for name in known if (found := _at(values, name.split("."))) is not None}
            result += [option, text]
            continue
        keys = path.removeprefix(mapping).split(".")[1:]
        known[mapping] = _replaced(known[mapping], keys, _value(text))
        nested = len(keys) > 1
        result += [f"--{mapping}.{keys[0]}", json.dumps(known[mapping][keys[0]])] if nested else [option, text]
    return result


def _mappings(cls: type, path: str = "") -> list[str]:
    """Return the dotted names of the free mappings in a dataclass tree."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if section := _dataclass_of(hint):
            found += _mappings(section, f"{path}{name}.")
        elif typing.get_origin(hint) is dict and typing.get_args(hint)[1] is Any:
            found.append(f"{path}{name}")
    return found


def _at(values: Any, keys: Sequence[str]) -> Any:
    """Return what lies in nested mappings at ``keys``, or None."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _replaced(values: Any, keys: Sequence[str], value: Any) -> Any:
    """Return nested mappings with the value at ``keys`` replaced; what is in the way is no mapping and goes."""
    if not keys:
        return value
    values = values if isinstance(values, dict) else {}
    return {**values, keys[0]: _replaced(values.get(keys[0]), keys[1:], value)}


def _value(text: str) -> Any:
    """Return an argument as YAML has it, or the text itself where it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def check_finite(config: Any, section: str) -> None:
    """Raise if a number of a configuration is not finite: comparisons with NaN would let it pass.

    Args:
        config: A dataclass.
        section: Its name in the configuration, for the message.

    Raises:
        ConfigError: It is NaN or infinite.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{section}.{field.name} must be a finite number, not {number}")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a dataclass tree as plain containers, tuples as lists, so that YAML and JSON can hold it."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    if not isinstance(values, dict) or not values:
        return {prefix.removesuffix("."): values} if prefix else {}
    return {name: item for key, value in values.items() for name, item in flat(value, f"{prefix}{key}.").items()}


def dump_yaml(config: Any) -> str:
    """Return a resolved configuration as YAML, in the order of its fields, without secrets."""
    return yaml.safe_dump(redacted(to_dict(config)), sort_keys=False)


_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes of a size such as ``5GB``, ``500MB``, ``64MiB`` or ``1000000``.

    Args:
        text: Number with an optional unit, decimal (as Hugging Face counts) or binary.
        option: The option it was given to, for the message.

    Raises:
        ConfigError: Not a size, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(text).strip(), flags=re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise ConfigError(f"{option} {text!r} is not a size; give for example 5GB, 500MB or 64MiB")
    return max(int(float(match[1]) * _UNITS[match[2].upper()]), 1)
