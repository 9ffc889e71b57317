"""Arguments of a recipe: a dataclass whose fields are options of the command line and keys of a YAML file."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Arguments = TypeVar("Arguments", bound=Any)


def parse_arguments(kind: type[Arguments], argv: Sequence[str]) -> Arguments:
    """Defaults, then the YAML file of `--config`, then the other options.

    Args:
        kind: a dataclass, each field with a default.
        argv: the command line without the program's name.

    Raises:
        ValueError: the file holds no keys and values, or keys that are no fields; or what `kind` refuses.
    """
    parser = HfArgumentParser(kind)
    parser.add_argument("--config", help="a YAML file with any of the options")
    config = parser.parse_known_args(argv)[0].config
    if config is not None:
        values = yaml.safe_load(Path(config).read_text("utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"{config}: expected keys and values, got {values!r}")
        unknown = sorted(map(str, set(values) - {field.name for field in fields(kind)}))
        if unknown:
            raise ValueError(f"{config}: unknown keys {', '.join(unknown)}")
        parser.set_defaults(**values)
    options = vars(parser.parse_args(argv))
    options.pop("config")
    return kind(**options)


def check_fields(
    arguments: Any, *, from_zero: Collection[str] = (), choices: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Refuse a field of another type, or a number out of range: the door of every recipe.

    Args:
        arguments: a dataclass; fields of other types than int, float, str and bool are its own affair.
        from_zero: integers that may be 0; others are at least 1. Real numbers are finite and not negative.
        choices: what a field may be.

    Raises:
        ValueError: the field, what was expected of it and what came.
    """
    for field in fields(arguments):
        name, value = field.name, getattr(arguments, field.name)
        least = 0 if name in from_zero else 1
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type is int and not (isinstance(value, int) and is_number and value >= least):
            raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")
        if field.type is float and not (is_number and 0 <= value < math.inf):
            raise ValueError(f"{name}: expected a finite number >= 0, got {value!r}")
        if field.type is str and not isinstance(value, str):
            raise ValueError(f"{name}: expected a text, got {value!r}")
        if field.type is bool and not isinstance(value, bool):
            raise ValueError(f"{name}: expected true or false, got {value!r}")
        allowed = (choices or {}).get(name)
        if allowed and value not in allowed:
            raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


__all__ = ["check_fields", "parse_arguments"]
