"""Arguments of a recipe: the command line wins over the file, the file over the defaults, and strangers are named."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from transformers_florence.training.arguments import check_fields, parse_arguments


@dataclass
class Recipe:
    steps: int = 5
    learning_rate: float = 0.1
    freeze: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected an integer >= 1, got {self.steps}")


@pytest.fixture
def config(tmp_path) -> Path:
    return tmp_path / "config.yaml"


def test_defaults_then_the_file_then_the_command_line(config):
    config.write_text("steps: 7\nlearning_rate: 1e-3\n")  # YAML reads 1e-3 as text
    assert parse_arguments(Recipe, []) == Recipe()
    assert parse_arguments(Recipe, ["--config", str(config)]) == Recipe(steps=7, learning_rate=1e-3)
    assert parse_arguments(Recipe, ["--steps", "9", "--config", str(config), "--freeze"]) == Recipe(9, 1e-3, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step: 7\n3: 4\n", "config.yaml: unknown keys 3, step"),
        ("", "config.yaml: expected keys and values, got None"),
        ("- steps\n", r"config.yaml: expected keys and values, got \['steps'\]"),
        ("steps: 0\n", "steps: expected an integer >= 1, got 0"),
    ],
)
def test_a_file_that_is_refused(config, text, message):
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(Recipe, ["--config", str(config)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected an integer >= 1, got 0"),
        ({"steps": 2.0}, "steps: expected an integer >= 1, got 2.0"),
        ({"steps": True}, "steps: expected an integer >= 1, got True"),
        ({"rest": -1}, "rest: expected an integer >= 0, got -1"),
        ({"rate": -0.1}, "rate: expected a finite number >= 0, got -0.1"),
        ({"rate": float("inf")}, "rate: expected a finite number >= 0, got inf"),
        ({"rate": "1"}, "rate: expected a finite number >= 0, got '1'"),
        ({"name": 3}, "name: expected a text, got 3"),
        ({"name": "c"}, "name: expected one of a, b, got 'c'"),
        ({"flag": 1}, "flag: expected true or false, got 1"),
    ],
)
def test_a_field_of_another_type_or_out_of_range_is_refused(changes, message):
    @dataclass
    class Fields:
        steps: int = 1
        rest: int = 0
        rate: float = 0
        name: str = "a"
        flag: bool = False
        sources: tuple = ()

    check = partial(check_fields, from_zero=("rest",), choices={"name": ("a", "b")})
    check(Fields())
    with pytest.raises(ValueError, match=message):
        check(Fields(**changes))
