"""What pretraining can be told: the file, the command line, and what is refused by name."""

from functools import partial
from pathlib import Path

import pytest

import pretrain_unicl
from pretrain_arguments import PretrainArguments
from transformers_florence.data.sources import Source, make_sources
from transformers_florence.training import arguments as recipe_arguments

parse_arguments = partial(recipe_arguments.parse_arguments, PretrainArguments)
CONFIGS = Path(pretrain_unicl.__file__).parent / "configs"


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 7\nlearning_rate: 1e-3\nobjective: clip\nmax_grad_norm: 2\n")  # YAML reads 1e-3 as text
    arguments = parse_arguments(["--config", str(config), "--steps", "9"])
    assert (arguments.steps, arguments.learning_rate, arguments.objective) == (9, 1e-3, "clip")
    assert arguments.batch_size == PretrainArguments.batch_size


def test_the_shipped_recipes_go_on_from_each_other():
    files = ("florence_nano.yaml", "florence_nano_stage2.yaml", "florence_nano_stage3.yaml")
    stages = [parse_arguments(["--config", str(CONFIGS / file)]) for file in files]
    assert {(stage.size, stage.objective, stage.batch_size) for stage in stages} == {("nano", "unicl", 256)}
    assert [stage.leave_out_templated for stage in stages] == [False, True, False]
    assert [stage.image_size for stage in stages] == [0, 0, 96]
    assert [stage.init_from for stage in stages] == ["", *(f"{stage.output}/model" for stage in stages[:2])]


def test_the_papers_stages_go_on_from_each_other():
    """Section 2.3: iterations, batch, tokens, sides; templated texts are left out after the first."""
    stages = [parse_arguments(["--config", str(CONFIGS / f"florence_huge_stage{n}.yaml")]) for n in (1, 2, 3)]
    assert [stage.steps for stage in stages] == [1_000_000, 180_000, 80_000]
    assert [stage.leave_out_templated for stage in stages] == [False, True, True]
    assert [stage.image_size for stage in stages] == [0, 0, 384]
    assert [stage.init_from for stage in stages] == ["", *(f"{stage.output}/model" for stage in stages[:2])]
    assert len({stage.output for stage in stages}) == 3
    for stage in stages:
        assert (stage.size, stage.batch_size, stage.context_length) == ("huge", 24576, 76)
        assert stage.objective == "unicl" and stage.prototype_weight == stage.small_part == 0
        assert len(make_sources(stage.sources)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nlearnig_rate: 0.1\nepochs: 3\n", "unknown keys epochs, learnig_rate"),
        ("", "expected keys and values, got None"),
        ("- steps\n", "expected keys and values"),
        ("objective: siglip\n", "objective: expected one of unicl, clip, sigmoid, got 'siglip'"),
        ("precision: float64\n", "precision: expected one of auto, float32, bfloat16, float16, got 'float64'"),
        ("steps: 0\n", "steps: expected an integer >= 1, got 0"),
        ("steps: 2.5\n", "steps: expected an integer >= 1, got 2.5"),
        ("steps: true\n", "steps: expected an integer >= 1, got True"),
        ("batch_size: [16]\n", r"batch_size: expected an integer >= 1, got \[16\]"),
        ("warmup_steps: -1\n", "warmup_steps: expected an integer >= 0, got -1"),
        ("learning_rate: .nan\n", "learning_rate: expected a finite number >= 0, got nan"),
        ("weight_decay: -0.1\n", "weight_decay: expected a finite number >= 0"),
        ("keyword_batches: 1.01\n", "keyword_batches: expected a part from 0 to 1, got 1.01"),
        ("category_batches: 0.6\nkeyword_batches: 0.5\n", "expected at most 1 together, got 1.1"),
        ("category_batches: 1.5\n", "category_batches: expected a part from 0 to 1, got 1.5"),
        ("seed: -1\n", "seed: expected an integer >= 0"),
        ("seed: 5000000000\n", "seed: expected less than 2 to the power of 31"),
        ("corpus: 3\n", "corpus: expected a text, got 3"),
        ("streaming: 3\n", "streaming: expected true or false, got 3"),
        ("streaming: true\n", "streaming: expected sources to stream, got none"),
        (
            "leave_out_templated: true\ncategory_batches: 0\n",
            "expected category_batches and keyword_batches of 0, .* got 0 and 0.15",
        ),
        ("sources: pictures\n", "sources: expected a list of mappings with a path and a text, got 'pictures'"),
        ("sources: [3]\n", r"sources: expected a list of mappings with a path and a text, got \[3\]"),
        ("sources: [{path: a, txt: b}]\n", "sources: expected mappings with some of .*'weight'.*: .*txt"),
        ("sources: [{path: a}]\n", "a: expected either a text or a label column"),
        ("held_out: [{text: b}]\n", "held_out: expected mappings with some of .*path"),
        ("bad_samples: keep\n", "bad_samples: expected one of skip, raise, got 'keep'"),
        ("templates: none\n", "templates: expected one of photo, drawing, got 'none'"),
        ("augmentation: 2\n", "augmentation: expected a part from 0 to 1, got 2"),
        ("ema_decay: 1\n", "ema_decay: expected less than 1, got 1"),
        ("zero_stage: 4\n", "zero_stage: expected 0 to 3, got 4"),
    ],
)
def test_a_file_with_wrong_values_is_refused_by_name(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(config)])


def test_sources_are_mappings_in_the_file_and_json_on_the_command_line(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("sources:\n  - {path: a, text: b, weight: 2}\n  - path: c\n    label: d\n")
    from_file = parse_arguments(["--config", str(config)])
    line = ['{"path": "a", "text": "b", "weight": 2}', '{"path": "c", "label": "d"}']
    wanted = [Source("a", text="b", weight=2), Source("c", label="d")]
    for arguments in (from_file, parse_arguments(["--sources", *line])):
        assert make_sources(arguments.sources) == wanted
