"""Fine-tune a dual encoder on pictures with captions: Florence's section 3.5.

    python examples/finetune_retrieval.py --data flickr8k --eval_split dev --output runs/retrieval
    python examples/finetune_retrieval.py --data flickr8k --eval_split dev --lora_rank 8 --learning_rate 5e-4

The loss of pretraining, a caption drawn anew for each picture in each epoch, cosine schedule with warm-up. The data
are whatever `data.captions.read_captions` reads: COCO's or Karpathy's JSON, Flickr's text file, a metadata.jsonl.
Every field of `RetrievalArguments` is an option and a key of the YAML file of `--config`; the paper's values are the
defaults but for its batch of 3072. The output holds what `training.recipe.fine_tune` writes; the result is one JSON
file of `results`, with curves of recall over k beside it. `--evaluate_only true` trains nothing, and takes CLIP and
SigLIP of transformers too. Needs the extra `train`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModel

from finetune_setup import (
    DualEncoderArguments,
    TrainingViews,
    adapt,
    best_scores,
    cost_of,
    report_run,
    save_model,
)
from transformers_florence import FlorenceModel
from transformers_florence.data.captions import CaptionedPicture, all_captions, read_captions
from transformers_florence.data.sources import text_label
from transformers_florence.evaluation.embedding import embed_pictures
from transformers_florence.evaluation.plots import recall_figure, save_beside
from transformers_florence.evaluation.results import Result, hash_pictures
from transformers_florence.evaluation.retrieval import evaluate_retrieval, first_ranks
from transformers_florence.evaluation.zero_shot import embed_texts
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import StepBatches, fine_tune


@dataclass
class RetrievalArguments(DualEncoderArguments):
    """As `DualEncoderArguments`, with the paper's schedule."""

    output: str = "runs/retrieval"
    epochs: int = 12
    batch_size: int = 64
    warmup_steps: int = 200
    eval_split: str = "test"
    min_scale: float = 0.9
    images: str = ""  # folder of the pictures, where the file with the captions lies elsewhere
    evaluate_only: bool = False  # score the model as it is, which may be CLIP or SigLIP, and train nothing

    free: ClassVar = (*DualEncoderArguments.free, "evaluate_only")


class Batches(StepBatches):
    """Views of pictures, each with one of its captions."""

    def __init__(
        self,
        arguments: RetrievalArguments,
        pictures: list[CaptionedPicture],
        processor: Any,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(pictures), rank, ranks)
        self.pictures, self.tokenizer = pictures, processor.tokenizer
        self.views = TrainingViews(processor.image_processor, arguments.min_scale, arguments.flip)

    def name(self, row: int) -> str:
        return self.pictures[row].file.name

    def sample(self, row: int) -> tuple[torch.Tensor, str]:
        captions = self.pictures[row].captions
        caption = captions[int(torch.randint(len(captions), ()))]
        return self.views.view(self.pictures[row].file, row), caption

    def collate(self, samples: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
        views, captions = zip(*samples, strict=True)
        tokens = self.tokenizer(list(captions), return_tensors="pt", padding=True, truncation=True)
        labels = torch.tensor([text_label(caption) for caption in captions])  # equal captions are positives: UniCL
        return {"pixel_values": self.views.batch(list(views)), **tokens, "labels": labels}


def embed_pairs(
    model: FlorenceModel, processor: Any, pictures: list[CaptionedPicture]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of pictures and of captions, and the picture of each caption; says how many pictures cannot be read."""
    files = [picture.file for picture in pictures]
    images, readable = embed_pictures(model, processor.image_processor, files)
    kept = [picture for picture, read in zip(pictures, readable.tolist(), strict=True) if read]
    if len(kept) < len(pictures):
        print(f"left out {len(pictures) - len(kept)} of {len(pictures)} pictures, unreadable")
    texts = embed_texts(model, processor.tokenizer, all_captions(kept)).cpu()
    counts = torch.tensor([len(picture.captions) for picture in kept])
    return images, texts, torch.arange(len(kept)).repeat_interleave(counts)


def score(model: FlorenceModel, processor: Any, pictures: list[CaptionedPicture]) -> dict[str, float]:
    """Recalls and ranks on pictures with captions; those that cannot be read are left out, and told."""
    return evaluate_retrieval(*embed_pairs(model, processor, pictures)).as_dict()


def rank_pairs(
    images: torch.Tensor, texts: torch.Tensor, picture_of_text: torch.Tensor, when: str = ""
) -> dict[str, torch.Tensor]:
    """Of the vectors of `embed_pairs`: ranks of each picture's captions and each caption's picture, with a title."""
    own = torch.arange(len(images))
    return {
        f"picture to text{when}": first_ranks(images, texts, own, picture_of_text),
        f"text to picture{when}": first_ranks(texts, images, picture_of_text, own),
    }


def main(argv: list[str] | None = None) -> Result | None:
    """Train; returns the result of the best model, None in processes that do not evaluate and for stopped runs."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(RetrievalArguments, argv)
    accelerator = arguments.make_accelerator()
    images = arguments.images or None
    held_out = read_captions(arguments.eval_data or arguments.data, arguments.eval_split or None, images=images)
    dual, processor = arguments.load(AutoModel if arguments.evaluate_only else FlorenceModel)
    vectors = embed_pairs(dual, processor, held_out)
    start = evaluate_retrieval(*vectors).as_dict()
    name = Path(arguments.eval_data or arguments.data).stem
    data = name, hash_pictures([picture.file for picture in held_out], [picture.captions for picture in held_out])
    if arguments.evaluate_only:
        result = report_run("retrieval", __file__, argv, arguments, data, start)
        save_beside(result.file(arguments.results), recall=recall_figure(rank_pairs(*vectors)))
        return result
    train = read_captions(arguments.data, arguments.train_split or None, images=images)
    batches = Batches(arguments, train, processor, accelerator.process_index, accelerator.num_processes)
    model = adapt(dual, arguments)
    groups = parameter_groups(
        model, arguments.weight_decay, learning_rate=arguments.learning_rate, layer_decay=arguments.layer_decay
    )
    fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=lambda plain, folder: save_model(plain, processor, folder),
        evaluate=lambda plain: score(plain, processor, held_out),
        best="recall_sum",
        record={"pictures": len(train)},
    )
    scores = best_scores(arguments.output)
    if not accelerator.is_main_process or not scores:
        return None
    metrics = {**scores, **{f"{name}_before": value for name, value in start.items()}, **cost_of(model)}
    result = report_run("finetune_retrieval", __file__, argv, arguments, data, metrics)
    best = FlorenceModel.from_pretrained(Path(arguments.output) / "best", dtype=torch.float32).eval()
    after = embed_pairs(best.to(accelerator.device), processor, held_out)
    ranks = rank_pairs(*vectors, ", before") | rank_pairs(*after, ", after")
    save_beside(result.file(arguments.results), recall=recall_figure(ranks))
    return result


if __name__ == "__main__":
    main()
