"""Curation: each rule against a slow count, the order of the rules, and planted pictures of every kind."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("imagededup", reason="needs the curation extra: pip install 'transformers_florence[curation]'")

from transformers_florence.data import curation
from transformers_florence.data.curation import (
    KEPT,
    REASONS,
    ROW_TYPE,
    TEXT_TYPE,
    CurationRules,
    Facts,
    LabelTable,
    PictureReader,
    decide,
    hash_pictures,
    in_blocks,
    near_any,
    near_earlier,
    near_pairs,
    over_cap,
    picture_bytes,
    scan,
)
from transformers_florence.data.sources import text_label


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A soft random pattern: no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def row(image, *texts: str) -> dict:
    return {"image": image, "texts": list(texts), "is_label": False}


def clustered_hashes(seed: int, centres: int = 12, count: int = 150) -> np.ndarray:
    """Hashes around a few centres, up to 12 bits away, some of them equal: (count,), uint64."""
    rng = np.random.default_rng(seed)
    middle = rng.integers(0, 1 << 63, centres, dtype=np.uint64)
    hashes = []
    for _ in range(count):
        bits = rng.choice(64, size=rng.integers(0, 13), replace=False)
        hashes.append(int(middle[rng.integers(centres)]) ^ sum(1 << int(bit) for bit in bits))
    return np.array([*hashes, *hashes[:10]], np.uint64)


def distance_of(first, second) -> int:
    return (int(first) ^ int(second)).bit_count()


# Hashes


@pytest.mark.parametrize("distance", [0, 1, 2, 6, 10, 31])
def test_near_pairs_are_all_there_and_no_other(distance):
    hashes = clustered_hashes(distance)
    wanted = [
        (i, j)
        for i in range(len(hashes))
        for j in range(i + 1, len(hashes))
        if distance_of(hashes[i], hashes[j]) <= distance
    ]
    assert list(map(tuple, near_pairs(hashes, distance))) == wanted and wanted


@pytest.mark.parametrize("distance", [0, 2, 6, 10])
def test_of_near_hashes_the_first_stays(distance):
    hashes = clustered_hashes(100 + distance)
    stay: list[int] = []
    for value in hashes:
        if not any(distance_of(value, hashes[other]) <= distance for other in stay):
            stay.append(len(stay) and next(i for i in range(len(hashes)) if hashes[i] == value))
    gone = near_earlier(hashes, distance)
    assert np.flatnonzero(~gone).tolist() == stay
    assert near_earlier(hashes[:1], distance).tolist() == [False]
    assert near_earlier(hashes[:0], distance).tolist() == []


def test_both_ends_of_a_chain_stay():
    chain = np.array([0b0, 0b11, 0b1111, 0b111111], np.uint64)
    assert near_earlier(chain, 2).tolist() == [False, True, False, True]


@pytest.mark.parametrize("distance", [0, 6])
def test_hashes_near_a_reference_are_found(distance):
    hashes, references = clustered_hashes(7), clustered_hashes(7, count=20)[:9]
    wanted = [any(distance_of(value, other) <= distance for other in references) for value in hashes]
    assert near_any(hashes, references, distance).tolist() == wanted
    assert 0 < sum(wanted) < len(wanted)
    assert not near_any(hashes, references[:0], distance).any()


def test_copies_are_near_and_other_pictures_are_not():
    pictures = [photo(seed) for seed in range(30)]
    copies = []
    for index, picture in enumerate(pictures):
        small = picture.resize((48, 36), Image.Resampling.BICUBIC)
        copies.append([encoded(small), encoded(picture, "JPEG", quality=40), encoded(picture, "WEBP")][index % 3])
    hashes, corrupt = hash_pictures(
        [*map(encoded, pictures), *copies, {"bytes": b"none", "path": None}], PictureReader(2)
    )
    assert corrupt == 1 and hashes.dtype == np.uint64
    assert not near_earlier(hashes[:30], CurationRules().duplicate_distance).any()
    assert near_earlier(hashes, CurationRules().duplicate_distance).tolist() == [False] * 30 + [True] * 30


def test_flat_pictures_are_one_picture():
    flat = [encoded(Image.new("RGB", (40, 40), color)) for color in ("white", "black", "red")]
    hashes, _ = hash_pictures(flat, PictureReader())
    assert len(set(hashes.tolist())) == 1, "a perceptual hash sees structure, and there is none"


# Balance


def test_no_label_is_left_more_often_than_the_cap():
    labels = np.random.default_rng(0).integers(0, 9, 500) ** 3
    over = over_cap(labels, 40, np.random.default_rng(1))
    for label, count in Counter(labels.tolist()).items():
        assert np.sum(~over & (labels == label)) == min(count, 40)
    assert np.array_equal(over, over_cap(labels, 40, np.random.default_rng(1)))
    assert not np.array_equal(over, over_cap(labels, 40, np.random.default_rng(2)))
    assert over_cap(labels[:0], 3, np.random.default_rng(0)).tolist() == []


def test_which_are_left_does_not_depend_on_their_place():
    drawn = sum(~over_cap(np.zeros(20, int), 5, np.random.default_rng(seed)) for seed in range(400))
    assert drawn.sum() == 2000 and drawn == pytest.approx(100, abs=40)


# Decisions


def facts_of(*rows: tuple) -> Facts:
    """Each row is (width, height, hash, [(label, relevance), ...])."""
    texts = [text for *_, own in rows for text in own]
    return Facts(
        np.array([(width, height, value, len(own)) for width, height, value, own in rows], ROW_TYPE),
        np.array(texts, TEXT_TYPE),
    )


def reasons_of(decision) -> list[str]:
    return ["kept" if fate == KEPT else REASONS[fate] for fate in decision.rows]


FAR = [0x0, 0xFFFF, 0xFFFF0000, 0xFFFF00000000, 0xFFFF000000000000]  # 32 bits apart, or 16


def test_each_row_goes_for_the_first_reason_that_is_true():
    good = [(1, 0.9)]
    facts = facts_of(
        (0, 0, 0, []),  # corrupt, and without a text
        (10, 10, 0, []),  # no text, and small
        (31, 200, FAR[0], good),  # small, and narrow
        (40, 161, FAR[0], good),  # narrow, and in the evaluation set
        (40, 160, FAR[4] ^ 0b111, [(1, 0.0)]),  # in the evaluation set, and a mismatch
        (32, 32, FAR[1], [(1, 0.1), (2, 0.2)]),  # a mismatch
        (32, 32, FAR[1] ^ 0b1, [(1, 0.1), (2, 0.9)]),  # a text of two: no duplicate of what has gone
        (32, 32, FAR[1] ^ 0b111, good),  # a duplicate
        (99, 99, FAR[2], good),
        (99, 99, FAR[3], good),
    )
    rules = CurationRules(min_relevance=0.5, label_cap=1, duplicate_distance=4)
    decision = decide(facts, rules, np.array([FAR[4]], np.uint64))
    assert reasons_of(decision)[:8] == [
        *("corrupt", "no text", "small", "narrow", "in evaluation", "mismatch", "kept", "duplicate"),
    ]
    assert sorted(reasons_of(decision)[8:]) == ["kept", "over cap"], "one of the two that share a label"
    assert decision.texts.tolist()[:6] == [False, False, False, False, False, False]
    assert decision.texts.sum() == 2
    assert decision.report == {
        "rows": 10,
        "kept": 2,
        "dropped": dict.fromkeys(REASONS, 1),
        "texts": 10,
        "texts_kept": 2,
        "texts_dropped": {"mismatch": 3, "over cap": 1},
        "labels": 2,
        "shared_labels": 0,
        "texts_of_shared_labels": 0,
    }


def test_limits_belong_to_what_is_kept():
    facts = facts_of((32, 128, FAR[0], [(1, 0.5)]), (32, 129, FAR[1], [(1, 0.5)]), (31, 31, FAR[2], [(1, 0.5)]))
    assert reasons_of(decide(facts, CurationRules(min_relevance=0.5))) == ["kept", "narrow", "small"]
    two = facts_of((32, 32, 0, [(1, 0.0)]), (32, 32, 0b111111, [(1, 0.0)]), (32, 32, 0b1111111 << 20, [(1, 0.0)]))
    assert reasons_of(decide(two, CurationRules(duplicate_distance=6))) == ["kept", "duplicate", "kept"]


def test_the_quantile_counts_what_earlier_rules_left():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 1 << 63, 100, dtype=np.uint64)
    values = np.arange(100) / 100
    facts = facts_of(
        *[(32 if n >= 20 else 8, 32, h, [(n, v)]) for n, (h, v) in enumerate(zip(hashes, values, strict=True))]
    )
    decision = decide(facts, CurationRules(relevance_quantile=0.25))
    assert reasons_of(decision) == ["small"] * 20 + ["mismatch"] * 20 + ["kept"] * 60


def test_shared_labels_are_counted():
    facts = facts_of(*[(64, 64, value, [(label, 0.0)]) for value, label in zip(FAR, (5, 6, 5, 7, 5), strict=True)])
    report = decide(facts, CurationRules()).report
    assert (report["labels"], report["shared_labels"], report["texts_of_shared_labels"]) == (3, 1, 3)


def test_nothing_at_all_is_decided_too():
    assert decide(Facts.join([]), CurationRules(label_cap=1, relevance_quantile=0.5)).report["kept"] == 0


def test_a_rule_on_unknown_relevance_is_refused():
    with pytest.raises(ValueError, match="expected the relevance of every text"):
        decide(facts_of((64, 64, 0, [(1, float("nan"))])), CurationRules(min_relevance=0.1))


@pytest.mark.parametrize(
    "options",
    [
        dict(min_side=0),
        dict(max_aspect=0.9),
        dict(max_aspect=float("nan")),
        dict(duplicate_distance=-1),
        dict(duplicate_distance=64),
        dict(min_relevance=1.5),
        dict(relevance_quantile=1.0),
        dict(relevance_quantile=-0.1),
        dict(label_cap=0),
        dict(seed=-1),
    ],
)
def test_impossible_rules_are_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}: expected a value in range, got"):
        CurationRules(**options)


# Scanning


@pytest.mark.parametrize("threads", [1, 3])
def test_the_facts_of_rows_are_those_of_their_pictures_and_texts(threads, tmp_path):
    photo(3, (50, 70)).save(tmp_path / "3.png")
    rows = [
        row(encoded(photo(1)), "a cat", "a dog"),
        row({"bytes": b"no picture", "path": None}, "lost"),
        row(None, "lost too"),
        row({"bytes": None, "path": str(tmp_path / "3.png")}),
        row({"bytes": None, "path": str(tmp_path / "nowhere.png")}, "a cow"),
        row(encoded(photo(2, (2000, 4))), "A  CAT"),
    ]
    facts = scan(rows, PictureReader(threads))
    assert facts.rows["width"].tolist() == [96, 0, 0, 50, 0, 2000]
    assert facts.rows["height"].tolist() == [72, 0, 0, 70, 0, 4]
    assert facts.rows["texts"].tolist() == [2, 1, 1, 0, 1, 1]
    assert facts.texts["label"].tolist() == [
        text_label(t) for t in ("a cat", "a dog", "lost", "lost too", "a cow", "a cat")
    ]
    assert np.isnan(facts.texts["relevance"]).all()


def test_relevance_is_asked_for_readable_pictures_with_texts():
    asked = []

    def relevance(prepared: list, texts: list[list[str]]) -> list[list[float]]:
        asked.append((prepared, texts))
        return [[width / 100 + len(text) for text in own] for width, own in zip(prepared, texts, strict=True)]

    rows = [
        row(encoded(photo(1, (50, 40))), "a", "bb"),
        row({"bytes": b"no picture", "path": None}, "lost"),
        row(encoded(photo(2))),
        row(encoded(photo(3, (60, 40))), "ccc"),
        row(encoded(photo(3, (70, 40))), "nobody asks"),
    ]
    prepare = lambda pixels: pixels.shape[2] if pixels.shape[2] < 70 else None  # noqa: E731
    facts = scan(rows, PictureReader(prepare=prepare), relevance)
    assert asked == [([50, 60], [["a", "bb"], ["ccc"]])]
    assert facts.texts["relevance"] == pytest.approx([1.5, 2.5, np.nan, 3.6, np.nan], nan_ok=True)


def test_blocks_hold_all_items_in_their_order():
    assert list(in_blocks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_blocks(range(6), 3)) == [[0, 1, 2], [3, 4, 5]]
    assert list(in_blocks([], 3)) == []


def test_a_row_without_a_picture_has_no_bytes():
    for image in (None, {"bytes": None, "path": None}):
        with pytest.raises(ValueError, match="expected a picture, got none"):
            picture_bytes(image)


# Labels


def test_equal_descriptions_have_one_label_and_are_counted():
    table = LabelTable()
    assert table.add("A Cat") == table.add(" a  cat") == text_label("a cat") != table.add("a dog")
    assert table.texts[text_label("a cat")] == "a cat" and table.counts[text_label("a cat")] == 2


def test_two_texts_of_one_label_are_refused(monkeypatch):
    monkeypatch.setattr(curation, "text_label", lambda text: 7)
    table = LabelTable()
    table.add("a cat")
    table.add("A cat")
    with pytest.raises(ValueError, match="expected a label for each text, got 7 for 'a cat' and 'a dog'"):
        table.add("a dog")
