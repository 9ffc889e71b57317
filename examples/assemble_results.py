"""RESULTS.md from the files of results: the paper's published tables first, then what was measured.

    python examples/assemble_results.py --results results --out RESULTS.md

No number is typed by hand: the published ones are those of `published_results.json`, with their sources; the measured
ones are what the scripts wrote, each beside its command, seed, commit and data.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers_florence.data.image_sets import benchmarks
from transformers_florence.evaluation.results import Result, load_results, markdown_table

PUBLISHED = Path(__file__).with_name("published_results.json")
TITLES = {
    "zero_shot": "Zero-shot classification",
    "linear_probe": "Linear probe",
    "few_shot": "Few-shot episodes",
    "few_shot_tuned": "Few-shot episodes, the tower tuned",
    "shots_per_class": "k pictures of each class",
    "finetune_classification": "Fine-tuning for classification",
    "retrieval": "Retrieval",
    "finetune_retrieval": "Fine-tuning for retrieval",
}
ZERO_SHOT_NAMES = {"accuracy": "top1"}  # what the zero-shot script calls the metric of a benchmark
INTRODUCTION = """# Results

Made by `python examples/assemble_results.py` from files; do not edit. First the tables of the Florence paper (Yuan et
al., 2021, arXiv 2111.11432) as published, with what of each runs here today. The paper's weights and data are not
public: nothing here reproduces its numbers. Then what was measured with this package, on the data that is named."""


def with_ours(table: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The paper's table 1 with a row, in per cent, for each model evaluated on official archives of its sets."""
    keys = list(benchmarks())  # in the order of the columns
    rows: dict[str, list[float | None]] = {}
    for result in results:
        archive = result.settings.get("benchmarks") or result.settings.get("data", "").startswith(f"{result.data}:")
        if result.task == "zero_shot" and result.data in keys and archive:  # no folder that happens to have its name
            metric = benchmarks()[result.data].metric
            cells = rows.setdefault(f"{result.model}, here", [None] * len(keys))
            cells[keys.index(result.data)] = round(100 * result.metrics[ZERO_SHOT_NAMES.get(metric, metric)], 1)
    return {**table, "rows": [*table["rows"], *rows.items()]}


def published_table(table: dict[str, Any]) -> str:
    """One table of the paper in Markdown, its source, what of it runs here, and the command."""
    lines = ["| model | " + " | ".join(table["columns"]) + " |", "|" + "---|" * (1 + len(table["columns"]))]
    for name, cells in table["rows"]:
        if len(cells) != len(table["columns"]):
            raise ValueError(f"{table['title']}, {name}: expected {len(table['columns'])} cells, got {len(cells)}")
        lines.append(f"| {name} | " + " | ".join("-" if cell is None else str(cell) for cell in cells) + " |")
    text = f"### {table['title']}\n\n" + "\n".join(lines) + f"\n\nSource: {table['source']}. Here: {table['runs']}"
    return text + ("\n\n```bash\n" + table["command"] + "\n```" if table.get("command") else "")


def assemble(results: list[Result], published: list[dict[str, Any]]) -> str:
    """The whole page."""
    tables = [with_ours(table, results) if table["source"].endswith("table 1") else table for table in published]
    parts = [INTRODUCTION, "## Published", *map(published_table, tables), "## Measured"]
    if not results:
        parts.append("Nothing yet.")
    tasks = [*TITLES, *sorted({result.task for result in results} - TITLES.keys())]
    for task in tasks:
        own = [result for result in results if result.task == task]
        if own:
            parts.append(f"### {TITLES.get(task, task)}\n\n{markdown_table(own)}")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--out", type=Path, default=Path("RESULTS.md"))
    arguments = parser.parse_args(argv)
    results = load_results(arguments.results)
    arguments.out.write_text(assemble(results, json.loads(PUBLISHED.read_text("utf-8"))), "utf-8")
    print(f"wrote {len(results)} results to {arguments.out}")


if __name__ == "__main__":
    main()
