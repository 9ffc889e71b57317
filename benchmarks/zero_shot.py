"""Zero-shot classification of a few pictures by many labels: transformers' pipeline beside a classifier built once.

    python benchmarks/zero_shot.py --pictures 8 --labels 100

The pipeline takes every label through the text tower again for each picture. Both name the pictures alike: checked.
Seconds are processor time, which other programs hardly touch. Prints one row in Markdown.
"""

import argparse
import time

import torch
from PIL import Image
from transformers import pipeline
from transformers.utils import logging

from transformers_florence import bundled_checkpoint, load_bundled
from transformers_florence.data.image_sets import benchmarks
from transformers_florence.evaluation.zero_shot import ZeroShotClassifier, embed_pixels

TEMPLATE = "This is a photo of {}."


def main(argv: list[str] | None = None) -> float:
    """Measure; returns how many times faster the classifier is, the building of it counted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--labels", type=int, default=100, help="at most the 1000 of ImageNet")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()
    model, processor = load_bundled()
    labels = list(benchmarks()["imagenet"].names[: arguments.labels])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (arguments.pictures, 64, 64, 3), generator=generator, dtype=torch.uint8)
    pictures = [Image.fromarray(picture.numpy()) for picture in pixels]
    pipe = pipeline(
        "zero-shot-image-classification", model=model, tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
    )  # fmt: skip

    def by_pipeline() -> list[str]:
        return [found[0]["label"] for found in pipe(pictures, candidate_labels=labels, hypothesis_template=TEMPLATE)]

    def by_classifier() -> list[str]:
        classifier = ZeroShotClassifier.build(model, processor.tokenizer, labels, [TEMPLATE])
        embeds = embed_pixels(model, processor(images=pictures, return_tensors="pt")["pixel_values"])
        return [labels[number] for number in classifier.logits(embeds).argmax(dim=1).tolist()]

    seconds = []
    answers = []
    for way in (by_pipeline, by_classifier):
        way()  # warm
        taken = []
        for _ in range(arguments.repeats):
            started = time.process_time()
            answer = way()
            taken.append(time.process_time() - started)
        seconds.append(min(taken))
        answers.append(answer)
    if answers[0] != answers[1]:
        raise ValueError(f"expected the same names of both ways, got {answers[0]} and {answers[1]}")
    ratio = seconds[0] / seconds[1]
    print("| checkpoint | pictures | labels | pipeline s | built once s | ratio |\n|---|---|---|---|---|---|")
    name = bundled_checkpoint().rstrip("/").split("/")[-1]
    print(f"| {name} | {len(pictures)} | {len(labels)} | {seconds[0]:.2f} | {seconds[1]:.2f} | {ratio:.1f} |")
    return ratio


if __name__ == "__main__":
    main()
