"""Run by the tests with an interpreter that has MTEB: two tasks on a folder of pictures, scores as JSON.

    python mteb_program.py ADAPTER CHECKPOINT DATA

ADAPTER is the file `mteb_model.py`; DATA holds `rows.json`, lists of file, class number and caption, and `names.json`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import mteb
from datasets import Dataset, DatasetDict, Image
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

ADAPTER, CHECKPOINT, DATA = sys.argv[1:]
ROWS, NAMES = (json.loads((Path(DATA) / f"{name}.json").read_text()) for name in ("rows", "names"))
FILES = [row[0] for row in ROWS]


def metadata(name: str, kind: str, category: str, main_score: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        description="A folder of pictures.",
        dataset={"path": "local/none", "revision": "0"},
        type=kind,
        category=category,
        modalities=["text", "image"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
    )


def pictures(**columns) -> Dataset:
    return Dataset.from_dict({**columns, "image": FILES}).cast_column("image", Image())


class FolderZeroShot(AbsTaskZeroShotClassification):
    metadata = metadata("FolderZeroShot", "ZeroShotClassification", "i2t", "accuracy")

    def load_data(self, **kwargs) -> None:
        self.dataset = DatasetDict({"test": pictures(label=[row[1] for row in ROWS])})
        self.data_loaded = True

    def get_candidate_labels(self) -> list[str]:
        return [f"a photo of a {name}." for name in NAMES]


class FolderRetrieval(AbsTaskRetrieval):
    metadata = metadata("FolderRetrieval", "Any2AnyRetrieval", "t2i", "recall_at_1")

    def load_data(self, **kwargs) -> None:
        numbers = [str(number) for number in range(len(ROWS))]
        queries = Dataset.from_dict(
            {"id": numbers, "text": [row[2] for row in ROWS], "modality": ["text"] * len(ROWS)}
        )
        split = {
            "corpus": pictures(id=numbers, modality=["image"] * len(ROWS)),
            "queries": queries,
            "relevant_docs": {number: {number: 1} for number in numbers},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


def main() -> None:
    spec = importlib.util.spec_from_file_location("mteb_model", ADAPTER)
    adapter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(adapter)
    model = adapter.DualEncoder(CHECKPOINT)
    found = mteb.evaluate(model, [FolderZeroShot(), FolderRetrieval()], cache=None, encode_kwargs={"batch_size": 4})
    scores = {result.task_name: result.scores["test"][0] for result in found.task_results}
    wanted = {"FolderZeroShot": ["accuracy"], "FolderRetrieval": ["recall_at_1", "recall_at_5"]}
    told = {task: {name: scores[task][name] for name in names} for task, names in wanted.items()}
    print("scores: " + json.dumps(told | {"revision": found.model_revision}))


if __name__ == "__main__":
    main()
