"""RESULTS.md holds what the files hold: the published tables with their sources, and every result once."""

import json
import re

import pytest

import assemble_results
from transformers_florence.evaluation.results import Result


def result(**changes) -> Result:
    fields = {"task": "zero_shot", "model": "nano", "data": "pets", "metrics": {"top1": 0.25}, "seed": 0}
    fields |= {"command": "python examples/evaluate_zero_shot.py --data pets", "commit": "", "data_hash": ""}
    return Result(**(fields | changes))


def test_the_page(tmp_path):
    result().save(tmp_path / "results")
    result(task="mine", metrics={"score": 0.75}).save(tmp_path / "results")
    assemble_results.main(["--results", str(tmp_path / "results"), "--out", str(tmp_path / "RESULTS.md")])
    text = (tmp_path / "RESULTS.md").read_text()
    assert (
        text.index("## Published") < text.index("## Measured") < text.index("### Zero-shot classification\n\n| model")
    )
    assert "| nano | 0.2500 | pets | 0 |" in text and "### mine" in text and "| nano | 0.7500 |" in text
    for table in json.loads(assemble_results.PUBLISHED.read_text()):
        assert table["title"] in text and table["source"] in text
        for name, cells in table["rows"]:
            shown = " | ".join("-" if cell is None else str(cell) for cell in cells)
            assert f"| {name} | {shown} |" in text


def test_every_command_names_a_script_that_is_there():
    folder = assemble_results.PUBLISHED.parent
    commands = [table["command"] for table in json.loads(assemble_results.PUBLISHED.read_text()) if table["command"]]
    scripts = [re.search(r"examples/(\w+\.py)", command)[1] for command in commands]
    assert len(scripts) >= 5 and all((folder / script).is_file() for script in scripts)


def test_figures_of_the_paper():
    """Means that the paper prints beside their parts."""
    tables = {table["source"].rsplit(" ", 1)[1]: table for table in json.loads(assemble_results.PUBLISHED.read_text())}
    assert set(tables) == set("123456789") | {"10"}
    for _, cells in tables["4"]["rows"]:
        assert cells[-1] == pytest.approx(sum(cells[:-1]) / 4, abs=0.15)


def test_our_row_stands_below_the_papers_zero_shot_table():
    """In per cent, with the metric of each set, of official archives only."""
    results = [
        result(data="cars", metrics={"top1": 0.1234, "mean_per_class": 0.9}, settings={"data": "cars:/data"}),
        result(data="pets", metrics={"top1": 0.9, "mean_per_class": 0.25}, settings={"benchmarks": True}),
        result(data="voc2007", metrics={"map_11_point": 0.5}, settings={"benchmarks": True}),
        result(data="dtd", settings={"data": "a/dtd"}),  # a folder of this name, whatever is in it
        result(data="food101", task="linear_probe", settings={"data": "food101:/data"}),
    ]
    table = json.loads(assemble_results.PUBLISHED.read_text())[0]
    assert table["columns"][4::2] == ["Cars", "VOC07", "Pets", "Flowers"] and len(table["columns"]) == 12
    row = "| nano, here | - | - | - | - | 12.3 | - | 50.0 | - | 25.0 | - | - | - |"
    assert row in assemble_results.published_table(assemble_results.with_ours(table, results))
    assert row in assemble_results.assemble(results, [table])
    assert "here |" not in assemble_results.assemble(results[3:], [table])


def test_a_row_of_another_length_is_refused():
    table = {"title": "T", "columns": ["a", "b"], "rows": [["x", [1.0]]], "source": "s", "runs": "r", "command": ""}
    with pytest.raises(ValueError, match="T, x: expected 2 cells, got 1"):
        assemble_results.published_table(table)
    assert "Nothing yet." in assemble_results.assemble([], [])
