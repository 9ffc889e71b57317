"""Corpora from disk and in memory: labels by equal names, categories by equal words, texts of the allowed forms."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from tests.tiny_corpus import SIDE, tiny_splits, write_tiny_corpus
from transformers_florence.data.picture_corpus import (
    SPLITS,
    PictureCorpus,
    load_split,
    number_texts,
    words_of_path,
)

COLUMNS = {"image": Image(), "name": Value("string")}
OPTIONAL = {
    "keywords": List(Value("string")),
    "description": Value("string"),
    "group": Value("string"),
    "subgroup": Value("string"),
}
TEMPLATES = ("{}", "a picture of {}", "{} icon")


def picture(color: str = "red", mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> PILImage.Image:
    return PILImage.new(mode, size, color)


def rows_of(names: list, **columns: list) -> Dataset:
    """A data set in memory with a red picture for each name."""
    values = {"image": [picture() for _ in names], "name": names, **columns}
    return Dataset.from_dict(values, Features({**COLUMNS, **{name: OPTIONAL[name] for name in columns}}))


def corpus_of(names: list, **columns: list) -> PictureCorpus:
    return PictureCorpus(rows_of(names, **columns), size=8, progress=False)


@pytest.fixture(scope="module")
def parquet_corpus(tmp_path_factory):
    return write_tiny_corpus(tmp_path_factory.mktemp("parquet"))


@pytest.fixture(scope="module")
def train_rows(parquet_corpus):
    return load_split(parquet_corpus, "train")


# Files


def test_every_split_comes_back_as_it_was_written(parquet_corpus):
    written = tiny_splits()
    assert tuple(written) == SPLITS
    for split in SPLITS:
        rows = load_split(str(parquet_corpus), split)
        assert list(rows["name"]) == [row["name"] for row in written[split]]
        assert list(rows["keywords"]) == [row["keywords"] for row in written[split]]
        assert rows[0]["image"].size == (SIDE, SIDE)


def test_an_image_folder_gives_the_same_corpus(tmp_path, train_rows):
    """Equal but for the order, which in an image folder is that of the files."""
    folder = write_tiny_corpus(tmp_path, "imagefolder", {"train": tiny_splits()["train"]})
    corpora = [PictureCorpus(rows, size=16, progress=False) for rows in (train_rows, load_split(folder, "train"))]
    texts = [{corpus.full_text(row): corpus.pixels[row] for row in range(len(corpus))} for corpus in corpora]
    pixels = [sorted(corpus.pixels.flatten(1).tolist()) for corpus in corpora]
    assert texts[0].keys() == texts[1].keys()
    assert pixels[0] == pixels[1]


def test_a_relative_folder_named_like_a_format_is_a_folder(tmp_path, monkeypatch):
    write_tiny_corpus(tmp_path / "parquet", splits={"train": tiny_splits()["train"][:3]})
    monkeypatch.chdir(tmp_path)
    assert len(load_split("parquet", "train")) == 3


def test_a_corpus_that_was_rebuilt_is_read_anew(tmp_path):
    splits = {"train": tiny_splits()["train"]}
    assert len(load_split(write_tiny_corpus(tmp_path / "corpus", splits=splits), "train")) == 64
    shutil.rmtree(tmp_path / "corpus")
    splits["train"] = splits["train"][::2]
    assert len(load_split(write_tiny_corpus(tmp_path / "corpus", splits=splits), "train")) == 32


def test_no_corpus_is_refused_with_the_folder_named(tmp_path, parquet_corpus):
    with pytest.raises(ValueError, match="expected the folder of a picture corpus, got .*nowhere"):
        load_split(tmp_path / "nowhere", "train")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="expected the folder of a picture corpus"):
        load_split(tmp_path / "file", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="expected a corpus with the split 'train' in .*empty"):
        load_split(tmp_path / "empty", "train")
    with pytest.raises(ValueError, match="expected a corpus with the split 'validation' in"):
        load_split(parquet_corpus, "validation")


def test_a_damaged_file_is_refused_with_the_folder_named(tmp_path):
    folder = write_tiny_corpus(tmp_path / "corpus", splits={"train": tiny_splits()["train"]})
    (file,) = (folder / "data").glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a corpus with the split 'train' in .*corpus"):
        load_split(folder, "train")


# Pixels


def test_pixels_are_bytes_of_the_pictures_in_their_order(train_rows):
    corpus = PictureCorpus(train_rows, size=SIDE, progress=False)
    assert corpus.pixels.shape == (64, 3, SIDE, SIDE) and corpus.pixels.dtype == torch.uint8
    assert len(corpus) == 64
    for row in (0, 63):
        assert np.array_equal(corpus.pixels[row].permute(1, 2, 0).numpy(), np.array(train_rows[row]["image"]))


def test_pictures_are_resized_as_pillow_does(train_rows):
    corpus = PictureCorpus(train_rows.select([1]), size=20, progress=False)
    resized = train_rows[1]["image"].resize((20, 20), PILImage.Resampling.BICUBIC)
    assert np.array_equal(corpus.pixels[0].permute(1, 2, 0).numpy(), np.array(resized))


@pytest.mark.parametrize(
    ("image", "color"),
    [
        (PILImage.new("RGBA", (8, 8), (0, 0, 0, 0)), (255, 255, 255)),  # transparent black, on white
        (PILImage.new("L", (4, 9), 128), (128, 128, 128)),
        (PILImage.new("I;16", (8, 8), 65535), (255, 255, 255)),
    ],
    ids=["transparent", "grey", "16 bit"],
)
def test_pictures_of_every_mode_become_rgb_as_in_the_image_processor(image, color):
    rows = Dataset.from_dict({"image": [image], "name": ["x"]}, Features(COLUMNS))
    corpus = PictureCorpus(rows, size=8, progress=False)
    assert (corpus.pixels[0] == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all()


# Labels


def test_labels_are_equal_exactly_where_names_are():
    names = ["Red  car", "red car", "car", "RED CAR ", "red-car", "car"]
    labels = corpus_of(names).labels
    assert labels.dtype == torch.int64
    for first, second in itertools.product(range(len(names)), repeat=2):
        same = names[first].lower().split() == names[second].lower().split()
        assert bool(labels[first] == labels[second]) == same, (names[first], names[second])


def test_labels_of_the_corpus_join_the_styles_of_a_concept(train_rows):
    labels = PictureCorpus(train_rows, size=8, progress=False).labels
    concepts = list(train_rows["concept"])
    emoji = [row for row in range(64) if concepts[row] >= 0]
    assert len(emoji) == 42
    for first, second in itertools.product(emoji, repeat=2):
        assert bool(labels[first] == labels[second]) == (concepts[first] == concepts[second])
    assert len(set(labels[len(emoji) :].tolist())) == 22, "each clip art has a title of its own"


def test_texts_are_numbered_in_order_of_appearance():
    assert number_texts(["b", "a", "B", "c", " a"]) == [0, 1, 0, 2, 1]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("face-smiling", "face smiling"),
        ("animals/birds", "birds, animals"),
        ("signs_and_symbols/map_symbols", "map symbols, signs and symbols"),
        ("/a//b/", "b, a"),
        ("", ""),
    ],
)
def test_paths_are_read_as_words(path, words):
    assert words_of_path(path) == words


def test_categories_are_the_subgroup_else_the_group_else_none():
    corpus = corpus_of(
        ["a", "b", "c", "d", "e"],
        group=["animals", "animals", "", "plants", None],
        subgroup=["animals/birds", "", "", "animals/birds", None],
    )
    assert corpus.category_names == ["birds, animals", "animals", "", "birds, animals", ""]
    categories = corpus.categories.tolist()
    assert categories[0] == categories[3] != categories[1]
    assert categories[2] == categories[4] == -1
    assert min(categories[:2]) >= 0


def test_images_and_names_are_enough():
    corpus = corpus_of(["a cat", "a dog"])
    assert corpus.categories.tolist() == [-1, -1]
    assert corpus.full_text(1) == "a dog"
    texts = {corpus.draw_text(0, TEMPLATES, np.random.default_rng(seed)) for seed in range(50)}
    assert texts == {template.format("a cat") for template in TEMPLATES}


# Texts


def test_the_full_text_holds_all_that_is_known():
    corpus = corpus_of(
        ["a cat", "a dog", "a cow"],
        keywords=[["pet", "soft"], [], None],
        description=["It sleeps.", "It barks.", None],
    )
    wanted = ["a cat. It sleeps.: pet, soft", "a dog. It barks.", "a cow"]
    assert [corpus.full_text(row) for row in range(3)] == wanted


def test_drawn_texts_take_all_allowed_forms_and_no_other():
    keywords = ["k1", "k2", "k3", "k4", "k5", "k6"]
    corpus = corpus_of(["a cat"], keywords=[keywords], description=["It sleeps."], subgroup=["animals/pets"])
    plain = {template.format("a cat") for template in TEMPLATES}
    with_keywords = {
        "a cat: " + ", ".join(chosen) for count in range(1, 5) for chosen in itertools.permutations(keywords, count)
    }
    forms = {
        "plain": plain,
        "keywords": with_keywords,
        "category": {"a cat, pets, animals"},
        "description": {"a cat. It sleeps."},
    }
    rng = np.random.default_rng(0)
    drawn = [corpus.draw_text(0, TEMPLATES, rng) for _ in range(2000)]
    counts = {form: sum(text in texts for text in drawn) for form, texts in forms.items()}
    assert sum(counts.values()) == 2000, set(drawn).difference(*forms.values())
    shares = {form: count / 2000 for form, count in counts.items()}
    assert shares == pytest.approx({"plain": 0.5, "keywords": 0.25, "category": 0.1, "description": 0.15}, abs=0.04)
    assert plain <= set(drawn), "a template is never drawn"
    lengths = {text.count(",") + 1 for text in drawn if text in with_keywords}
    assert lengths == {1, 2, 3, 4}


def test_without_templates_a_text_says_more_than_the_name():
    corpus = corpus_of(
        ["a cat", "a dog", "a cow", "a hen", "an ox"],
        keywords=[["pet"], ["pet"], [], [], []],
        description=["It sleeps.", None, "It moos.", None, None],
        subgroup=["animals/pets", None, None, "animals", None],
    )
    assert [corpus.has_more_than_a_name(row) for row in range(5)] == [True, True, True, True, False]
    rng = np.random.default_rng(0)
    drawn = [{corpus.draw_text(row, (), rng) for _ in range(60)} for row in range(4)]
    assert drawn == [
        {"a cat: pet", "a cat, pets, animals", "a cat. It sleeps."},
        {"a dog: pet"},
        {"a cow. It moos."},
        {"a hen, animals"},
    ]
    with pytest.raises(ValueError, match="row 4: expected keywords, a category or a description, got 'an ox' alone"):
        corpus.draw_text(4, (), rng)


def test_a_category_is_drawn_in_templates():
    corpus = corpus_of(["a cat"], subgroup=["animals/pets"])
    rng = np.random.default_rng(0)
    texts = {corpus.draw_category_text(0, TEMPLATES, rng) for _ in range(50)}
    assert texts == {template.format("pets, animals") for template in TEMPLATES}


def test_general_words_are_keywords_of_several_labels():
    names = ["a", "b", "c", "d", "d", "d", "d"]
    corpus = corpus_of(names, keywords=[["Pet"], ["pet", "soft"], ["PET "], ["pet"], ["soft"], ["soft"], ["soft"]])
    assert corpus.keyword_names == ["pet"], "four pictures of one name are not four labels; case is no difference"
    assert corpus.keyword_rows["pet"].tolist() == [0, 1, 2, 3]
    texts = {corpus.draw_keyword_text(0, TEMPLATES, np.random.default_rng(seed)) for seed in range(30)}
    assert texts == {template.format("pet") for template in TEMPLATES}


def test_no_drawn_row_has_the_keyword_of_another():
    rng = np.random.default_rng(0)
    words = [f"k{index}" for index in range(30)]
    keywords = [rng.choice(words, size=3, replace=False).tolist() for _ in range(200)]
    corpus = corpus_of([f"n{index}" for index in range(200)], keywords=keywords)
    drawn = set()
    for seed in range(40):
        rows, labels = corpus.draw_keyword_rows(18, np.random.default_rng(seed))
        assert 0 < len(rows) == len(labels) == len(set(rows.tolist())) <= 18
        used = {corpus.keyword_names[label] for label in labels}
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            assert used & set(keywords[row]) == {corpus.keyword_names[label]}
        drawn |= used
        again = corpus.draw_keyword_rows(18, np.random.default_rng(seed))
        assert np.array_equal(rows, again[0]) and np.array_equal(labels, again[1])
    assert drawn == set(words)


def test_common_keywords_come_more_often():
    names = [f"n{index}" for index in range(100)]
    corpus = corpus_of(names, keywords=[["common"] if index < 80 else ["rare"] for index in range(100)])
    first = [corpus.draw_keyword_rows(1, np.random.default_rng(seed))[1][0] for seed in range(400)]
    assert np.mean([corpus.keyword_names[label] == "common" for label in first]) == pytest.approx(0.8, abs=0.06)


def test_without_general_words_nothing_is_drawn():
    rows, labels = corpus_of(["a", "b"]).draw_keyword_rows(4, np.random.default_rng(0))
    assert rows.tolist() == labels.tolist() == []


def test_the_generator_decides_the_texts(train_rows):
    corpus = PictureCorpus(train_rows, size=8, progress=False)

    def draw(seed: int) -> list[str]:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(64)  # numpy's integers index rows as Python's do
        return [corpus.draw_text(row, TEMPLATES, rng) for row in rows]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


# Refusals


def test_what_is_no_corpus_is_refused(train_rows):
    with pytest.raises(ValueError, match="at least one picture"):
        PictureCorpus(train_rows.select([]), size=8)
    with pytest.raises(ValueError, match=r"without \['name'\]"):
        PictureCorpus(train_rows.remove_columns("name"), size=8)
    with pytest.raises(ValueError, match=r"without \['image'\]"):
        PictureCorpus(train_rows.remove_columns("image"), size=8)


@pytest.mark.parametrize("name", ["", "  ", None])
def test_a_picture_without_a_name_is_refused_by_its_row(name):
    with pytest.raises(ValueError, match="a name in every row, got .* in row 1"):
        corpus_of(["a cat", name])


def test_a_picture_that_the_image_processor_refuses_is_refused_by_its_row():
    rows = Dataset.from_dict({"image": [picture(), picture(size=(2000, 1))], "name": ["a", "b"]}, Features(COLUMNS))
    with pytest.raises(ValueError, match="row 1: expected sides of a ratio"):
        PictureCorpus(rows, size=8, progress=False)
