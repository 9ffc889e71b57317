"""Pictures with texts and labels, as Florence's triplets (section 2.1): decoded once, texts drawn anew each time.

Reads what `examples/build_picture_corpus.py` writes, and any other set with the columns `image`, `name` and,
optionally, `keywords`, `description`, `group`, `subgroup`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..image_processing_pil_florence import FlorenceImageProcessorPil
from .prompts import fill_random_template, normalize_text

SPLITS = ("train", "test_style", "test_concept", "test_clipart")
KEYWORD_PICTURES = 4  # rows of one keyword in a batch of keywords


def load_split(folder: str | Path, split: str):
    """One split of a corpus folder as a `datasets.Dataset`.

    Raises:
        ValueError: no such folder, nothing in it that `datasets` reads, a damaged file, or no such split.
    """
    from datasets import config, load_dataset, load_dataset_builder  # an extra: only who has pictures on disk needs it
    from datasets.exceptions import DatasetsError
    from datasets.fingerprint import Hasher

    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a picture corpus, got {str(folder)!r}")
    path = str(folder.resolve())  # `load_dataset("parquet")` would mean the format and not the folder of that name
    try:
        # Where a README.md names the splits, `datasets` has one cache for all folders of one name and never looks
        # whether their files changed: a corpus that was rebuilt would be read as it was. So the cache's place says
        # what is in it: paths and times of the files.
        files = Hasher.hash(load_dataset_builder(path).config.data_files)
        return load_dataset(path, split=split, cache_dir=str(config.HF_DATASETS_CACHE / f"picture_corpus_{files}"))
    except (ValueError, FileNotFoundError, DatasetsError) as error:
        raise ValueError(f"expected a corpus with the split {split!r} in {str(folder)!r}: {error}") from error


def words_of_path(path: str) -> str:
    """A category path such as `face-smiling` or `animals/birds` as words, outer category last."""
    return ", ".join(part.replace("-", " ").replace("_", " ") for part in reversed(path.split("/")) if part)


class PictureCorpus:
    """Rows of a split in memory: pixels as bytes, texts, and the label of each row (its description's number).

    Args:
        rows: a `datasets.Dataset` with the columns above.
        size: side of the stored pictures in pixels; they are resized to squares of this size once, after
            transparency, palettes and the like became RGB as the image processor does it.
        progress: whether to show a bar while decoding.

    Raises:
        ValueError: no rows, no column `image` or `name`, a row without a name, or a picture that the image
            processor refuses.

    Attributes:
        pixels: (rows, 3, size, size), uint8.
        labels: (rows,), int64: rows whose `name` is the same text have the same number (the paper's hash table).
        categories: (rows,), int64: the same for the category, -1 where a row has none.
        keyword_names: the general words, as `normalize_text` makes them: keywords of at least `KEYWORD_PICTURES`
            labels.
    """

    def __init__(self, rows, *, size: int, progress: bool = True) -> None:
        if len(rows) == 0:
            raise ValueError("expected a corpus with at least one picture, got none")
        if missing := {"image", "name"} - set(rows.column_names):
            raise ValueError(
                f"expected the columns image and name, got {rows.column_names}, without {sorted(missing)}"
            )
        self.names: list[str] = list(rows["name"])
        for index, name in enumerate(self.names):
            if not isinstance(name, str) or not name.strip():
                raise ValueError(f"expected a name in every row, got {name!r} in row {index}")
        self.pixels = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
        door = FlorenceImageProcessorPil()
        for index, image in enumerate(tqdm(rows["image"], desc="decoding", unit="picture", disable=not progress)):
            picture = Image.fromarray(door.process_image(image, f"row {index}").transpose(1, 2, 0))
            resized = picture.resize((size, size), Image.Resampling.BICUBIC)
            self.pixels[index] = torch.from_numpy(np.array(resized)).permute(2, 0, 1)
        self.keywords = self._column(rows, "keywords", [])
        self.descriptions = self._column(rows, "description", "")
        paths = self._column(rows, "subgroup", "")
        groups = self._column(rows, "group", "")
        self.category_names = [words_of_path(path or group or "") for path, group in zip(paths, groups, strict=True)]
        self.labels = torch.tensor(number_texts(self.names))
        numbers = torch.tensor(number_texts(self.category_names))
        has_category = torch.tensor([bool(name) for name in self.category_names])
        self.categories = torch.where(has_category, numbers, -1)
        # As a dictionary's keys: each once, in their order.
        self.general_words = [dict.fromkeys(map(normalize_text, keywords)) for keywords in self.keywords]
        rows_of: dict[str, list[int]] = {}
        for row, keywords in enumerate(self.general_words):
            for keyword in keywords:
                rows_of.setdefault(keyword, []).append(row)
        self.keyword_rows = {
            keyword: np.array(found)
            for keyword, found in rows_of.items()
            if len(self.labels[found].unique()) >= KEYWORD_PICTURES
        }
        self.keyword_names = list(self.keyword_rows)

    @staticmethod
    def _column(rows, name: str, default):
        values = list(rows[name]) if name in rows.column_names else [None] * len(rows)
        return [default if value is None else value for value in values]

    def __len__(self) -> int:
        return len(self.names)

    def full_text(self, row: int) -> str:
        """Everything that is known of a picture: name, description, keywords."""
        text = self.names[row]
        if self.descriptions[row]:
            text += ". " + self.descriptions[row]
        if self.keywords[row]:
            text += ": " + ", ".join(self.keywords[row])
        return text

    def has_more_than_a_name(self, row: int) -> bool:
        """Whether `draw_text` finds a text of a row that stands in no template."""
        return bool(self.keywords[row] or self.category_names[row] or self.descriptions[row])

    def draw_text(self, row: int, templates: Sequence[str], rng: np.random.Generator) -> str:
        """A random text of a row: its name in a template, with some keywords, its category, or its description.

        No templates leave the other three (the paper's second stage); ValueError for a row that has none of them.
        """
        name, keywords, choice = self.names[row], self.keywords[row], rng.random()
        if not templates:
            known = ((0.0, keywords), (0.25, self.category_names[row]), (0.35, self.descriptions[row]))
            kinds = [start for start, words in known if words]
            if not kinds:
                raise ValueError(f"row {row}: expected keywords, a category or a description, got {name!r} alone")
            choice = kinds[int(choice * len(kinds))]
        if choice < 0.25 and keywords:
            count = min(len(keywords), int(rng.integers(1, 5)))
            picked = rng.choice(len(keywords), size=count, replace=False)
            return name + ": " + ", ".join(keywords[int(index)] for index in picked)
        if choice < 0.35 and self.category_names[row]:
            return f"{name}, {self.category_names[row]}"
        if choice < 0.5 and self.descriptions[row]:
            return f"{name}. {self.descriptions[row]}"
        return fill_random_template(templates, name, rng)

    def draw_category_text(self, row: int, templates: Sequence[str], rng: np.random.Generator) -> str:
        """The row's category in a random template."""
        return fill_random_template(templates, self.category_names[row], rng)

    def draw_keyword_rows(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Rows, and of each the number of one of its keywords in `keyword_names`; no row has the keyword of another.

        A keyword comes with `KEYWORD_PICTURES` rows; the more rows of the corpus have it, the likelier it comes.
        Rows of one label must be all that the text is true of, or the loss would push the text away from pictures
        that it describes: whoever has a keyword that is in the batch can only be there for it.

        Returns:
            (drawn,) and (drawn,), int64: `count` rows, or as many as there are without such a contradiction.
        """
        weights = np.array([len(rows) for rows in self.keyword_rows.values()])
        free = np.ones(len(self), dtype=bool)
        used: set[str] = set()  # keywords of the rows that are drawn
        rows: list[int] = []
        labels: list[int] = []
        # An exponential race: the order of weighted draws without replacement.
        for label in np.argsort(rng.exponential(size=len(weights)) / weights):
            keyword = self.keyword_names[label]
            candidates = self.keyword_rows[keyword]
            candidates = candidates[free[candidates]]
            if keyword in used or len(candidates) < KEYWORD_PICTURES:
                continue
            picked = rng.choice(candidates, size=KEYWORD_PICTURES, replace=False)[: count - len(rows)].tolist()
            rows += picked
            labels += [int(label)] * len(picked)
            free[self.keyword_rows[keyword]] = False
            used.update(*(self.general_words[row] for row in picked))
            if len(rows) == count:
                break
        return np.array(rows, dtype=np.int64), np.array(labels, dtype=np.int64)

    def draw_keyword_text(self, label: int, templates: Sequence[str], rng: np.random.Generator) -> str:
        """The keyword of a number in a random template."""
        return fill_random_template(templates, self.keyword_names[label], rng)


def number_texts(texts: Sequence[str]) -> list[int]:
    """The paper's hash table: each text's number, equal for texts that are equal after `normalize_text`."""
    table: dict[str, int] = {}
    return [table.setdefault(normalize_text(text), len(table)) for text in texts]


__all__ = ["SPLITS", "PictureCorpus", "load_split", "number_texts", "words_of_path"]
