"""Evaluate a dual encoder on the held-out parts of the picture corpus, beside a nearest neighbour on raw pixels.

    python examples/evaluate_pictures.py --model runs/florence-nano/model --corpus corpus

(a) pictures of a held-out drawing style, of concepts seen in training, named among all seen names;
(b) pictures of concepts never seen in training, sorted into all subgroups by the subgroups' words alone;
(c) held-out clip art: pictures found by text and texts found by picture;
(d) pictures of (a) found by a general word: one keyword that several of them have.
The floor of (a) and (b) is the nearest training picture at 12 x 12 pixels. Prints one JSON object.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from transformers_florence import FlorenceModel, FlorenceProcessor, bundled_checkpoint, load_checkpoint
from transformers_florence.data.picture_corpus import load_split, words_of_path
from transformers_florence.data.prompts import normalize_text
from transformers_florence.evaluation.retrieval import precision_at_k, recall_at_k
from transformers_florence.evaluation.zero_shot import (
    build_zero_shot_classifier,
    embed_pixels,
    embed_texts,
    top_k_accuracy,
)

PICTURES_OF_A_KEYWORD = 5  # a general word of (d) belongs to so many pictures at least, and so many are looked at
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "an icon of {}", "{} icon")


def embed_rows(model: FlorenceModel, processor: FlorenceProcessor, rows, batch_size: int = 128) -> torch.Tensor:
    """Unit vectors of the pictures of a split, (rows, projection_dim)."""
    chunks = []
    for start in tqdm(range(0, len(rows), batch_size), desc="pictures", leave=False):
        pixels = processor(images=rows[start : start + batch_size]["image"], return_tensors="pt")["pixel_values"]
        chunks.append(embed_pixels(model, pixels))
    return torch.cat(chunks)


def small_pixels(rows, side: int = 12) -> torch.Tensor:
    """The pictures of a split as vectors of side * side * 3 numbers."""
    small = [
        np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BOX), np.float32).ravel()
        for image in rows["image"]
    ]
    return torch.from_numpy(np.stack(small))


def only(rows, **wanted):
    """Rows whose columns have the wanted values. Raises ValueError if there are none."""
    columns = zip(*(list(rows[column]) for column in wanted), strict=True)
    keep = [index for index, values in enumerate(columns) if values == tuple(wanted.values())]
    if not keep:
        raise ValueError(f"expected rows with {wanted} in the split, got none among {len(rows)}")
    return rows.select(keep)


def name_pictures(model, processor, train, test, names: list[str]) -> dict[str, float]:
    """(a): top-1 and top-5 of the right name among all names, and the floor."""
    column = {name: index for index, name in enumerate(names)}
    seen = [index for index, name in enumerate(test["name"]) if name in column]
    if not seen:
        raise ValueError(f"expected pictures with names of training, got none among {len(test)}")
    test = test.select(seen)
    targets = torch.tensor([column[name] for name in test["name"]])
    scores = (
        embed_rows(model, processor, test) @ build_zero_shot_classifier(model, processor.tokenizer, names, TEMPLATES).T
    )
    nearest = torch.cdist(small_pixels(test), small_pixels(train)).argmin(dim=1)
    train_names = list(train["name"])
    floor = [train_names[index] == name for index, name in zip(nearest.tolist(), test["name"], strict=True)]
    return {
        "pictures": len(test),
        "names": len(names),
        "top1": top_k_accuracy(scores, targets, 1),
        "top5": top_k_accuracy(scores, targets, 5),
        "floor_top1": float(np.mean(floor)),
    }


def sort_pictures(model, processor, train, test, subgroups: list[str]) -> dict[str, float]:
    """(b): pictures of unseen concepts, their subgroup among all subgroups, and the floor."""
    column = {name: index for index, name in enumerate(subgroups)}
    targets = torch.tensor([column[name] for name in test["subgroup"]])
    words = [words_of_path(name) for name in subgroups]
    classifier = build_zero_shot_classifier(model, processor.tokenizer, words, TEMPLATES)
    scores = embed_rows(model, processor, test) @ classifier.T
    nearest = torch.cdist(small_pixels(test), small_pixels(train)).argmin(dim=1)
    train_groups = list(train["subgroup"])
    floor = [train_groups[index] == group for index, group in zip(nearest.tolist(), test["subgroup"], strict=True)]
    return {
        "pictures": len(test),
        "subgroups": len(subgroups),
        "top1": top_k_accuracy(scores, targets, 1),
        "top5": top_k_accuracy(scores, targets, 5),
        "floor_top1": float(np.mean(floor)),
    }


def retrieve_clipart(model, processor, test) -> dict[str, float]:
    """(c): recall of the one right text for each picture, and of the right pictures for each text."""
    texts = []
    for row in test.remove_columns("image"):
        text = row["name"] + (f". {row['description']}" if row["description"] else "")
        texts.append(text + (": " + ", ".join(row["keywords"]) if row["keywords"] else ""))
    images = embed_rows(model, processor, test)
    embeds = embed_texts(model, processor.tokenizer, texts)
    same = torch.tensor([[one == other for other in texts] for one in texts])  # equal texts are equally right
    result: dict[str, float] = {"pictures": len(texts), "texts": len(set(texts))}
    for k in (1, 5, 10):
        result[f"image_to_text_r{k}"] = recall_at_k(images, embeds, same, k)
        result[f"text_to_image_r{k}"] = recall_at_k(embeds, images, same, k)
    return result


def find_by_keyword(model, processor, test, names: list[str]) -> dict[str, float]:
    """(d): part of the first pictures found by a keyword that have it, and the part that chance would find."""
    seen = set(names)
    test = test.select([index for index, name in enumerate(test["name"]) if name in seen])
    keywords = [{normalize_text(word) for word in words} for words in test["keywords"]]
    counts = Counter(word for words in keywords for word in words)
    queries = sorted(word for word, count in counts.items() if count >= PICTURES_OF_A_KEYWORD)
    if not queries:
        least = PICTURES_OF_A_KEYWORD
        raise ValueError(f"expected keywords of {least} pictures each, got none among {len(test)} pictures")
    relevant = torch.tensor([[word in words for words in keywords] for word in queries])
    embeds = embed_texts(model, processor.tokenizer, [f"a picture of {word}" for word in queries])
    return {
        "pictures": len(test),
        "keywords": len(queries),
        "precision_at_5": precision_at_k(embeds, embed_rows(model, processor, test), relevant, PICTURES_OF_A_KEYWORD),
        "floor_precision_at_5": relevant.float().mean().item(),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="folder of a model; the bundled florence-nano if left out")
    parser.add_argument("--corpus", default="corpus")
    parser.add_argument("--output", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args(argv)
    folder = arguments.model or bundled_checkpoint("florence-nano")
    model = load_checkpoint(FlorenceModel, folder, dtype=torch.float32)
    processor = FlorenceProcessor.from_pretrained(folder)

    train = only(load_split(arguments.corpus, "train"), source="emoji")
    style = load_split(arguments.corpus, "test_style")
    unseen = load_split(arguments.corpus, "test_concept")
    clipart = load_split(arguments.corpus, "test_clipart")
    # A subgroup may have no picture in training at all: sorted by its words alone, it is one like the others.
    names, subgroups = sorted(set(train["name"])), sorted({*train["subgroup"], *unseen["subgroup"]})
    result = {
        "a_seen_concepts_noto": name_pictures(model, processor, train, only(style, style="noto"), names),
        "a_seen_concepts_noto_v1": name_pictures(model, processor, train, only(style, style="noto-v1"), names),
        "b_unseen_concepts_noto": sort_pictures(model, processor, train, only(unseen, style="noto"), subgroups),
        "b_unseen_concepts_all_styles": sort_pictures(model, processor, train, unseen, subgroups),
        "c_clipart": retrieve_clipart(model, processor, clipart),
        "d_keywords_noto": find_by_keyword(model, processor, only(style, style="noto"), names),
    }
    result = {
        part: {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        for part, row in result.items()
    }
    print(json.dumps(result, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
