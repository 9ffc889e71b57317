"""Arguments of a recipe: a dataclass whose fields are options of the command line and keys of a YAML file."""

from collections.abc import Sequence
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


__all__ = ["parse_arguments"]
