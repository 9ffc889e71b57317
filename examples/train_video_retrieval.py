"""Train clips and texts into one space, from a dual encoder of pictures, with UniCL on video-text-label triplets.

    python examples/train_video_retrieval.py --data_format msrvtt --data train.csv --eval_data 1k.csv --root videos
    python examples/train_video_retrieval.py --data_format shards --data shards --text_column json.caption
    python examples/train_video_retrieval.py --epochs 0 ...  # zero-shot: scores of the inflated dual encoder
    python examples/train_video_retrieval.py --config examples/configs/train_video_joint.yaml  # pictures, then both
    accelerate launch --num_processes 8 examples/train_video_retrieval.py --config ... --batch_size 256

A clip without a text is described by its class. Clips and texts of one description are positives of each other, on
all ranks. Every field of `RetrievalArguments` is an option of the command line and a key of the YAML file; the output
holds what `finetune_video.py` leaves, `best` with the tokenizer beside. Needs the extras `train` and `video`.

Pictures can be learnt from beside the clips, in OmniVL's decoupled schedule (Wang et al. 2022): pictures alone for
`image_first` of the run, then steps of pictures and steps of clips, `image_share` of them of pictures. With 0 and 0
that is clips alone, with 0 and 0.5 both from the start, with 0.5 and 0 pictures and then clips, with 0.5 and 0.5 the
decoupled schedule. A picture goes through the tower as a clip of one frame, which the first embedding repeats to fill
its tube. It costs one token of time, and what frames of different times are to each other is not learnt from what
stands still, as it would be from a picture that is repeated to the length of a clip.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from tqdm.auto import tqdm

from transformers_florence import FlorenceConfig, FlorenceTokenizer, FlorenceVideoProcessor
from transformers_florence.configuration_florence import FlorenceTextConfig
from transformers_florence.configuration_florence_video import FlorenceVideoTextConfig
from transformers_florence.data.captions import read_captions
from transformers_florence.data.sources import text_label
from transformers_florence.data.video import Clip
from transformers_florence.data.video_transforms import collate_clips
from transformers_florence.evaluation.video import evaluate_video_retrieval
from transformers_florence.modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.distributed import global_unicl_loss
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import fine_tune
from video_recipes import ClipBatches, VideoArguments, make_processor, read_sets


@dataclass
class RetrievalArguments(VideoArguments):
    """What a run is made of besides what both video recipes are told."""

    output: str = "runs/video_retrieval"
    batch_size: int = 32
    learning_rate: float = 2e-4
    epochs: int = 10  # as many steps as the clips fill so often; 0 for the scores before any training
    image_data: str = ""  # pictures with texts to learn from beside the clips: see `data.captions.read_captions`
    image_split: str = ""
    image_first: float = 0.0  # part of the steps, at the start, that are of pictures alone
    image_share: float = 0.0  # part of the steps after these that are of pictures

    from_zero: ClassVar = (*VideoArguments.from_zero, "epochs")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_first", "image_share"):
            if (part := getattr(self, name)) > 1:
                raise ValueError(f"{name}: expected at most 1, got {part}")
        if bool(self.image_data) != bool(self.image_first or self.image_share):
            parts = f"image_first {self.image_first} and image_share {self.image_share}"
            raise ValueError(f"expected image_data with a part of the steps, got {self.image_data!r} with {parts}")


def with_texts(clips: Sequence[Clip]) -> list[Clip]:
    """Clips that are described; the description of one without a text is its class.

    Raises:
        ValueError: a clip with neither.
    """
    described = []
    for clip in clips:
        texts = clip.texts or ((clip.label,) if clip.label else ())
        if not texts:
            raise ValueError(f"{clip.name}: expected a text or a class, got neither")
        described.append(Clip(clip.source, clip.name, clip.label, texts, clip.film, clip.strip))
    return described


class Batches(ClipBatches):
    """Triplets: a clip, one of its texts, and the label of that text."""

    def __init__(
        self,
        arguments: RetrievalArguments,
        clips: Sequence[Clip],
        processor: FlorenceVideoProcessor,
        model: FlorenceForVideoTextRetrieval,
        tokenizer: FlorenceTokenizer,
        **ranks: int,
    ) -> None:
        super().__init__(arguments, clips, processor, **ranks)
        self.tokenizer, self.context = tokenizer, model.config.text_config.max_position_embeddings

    def sample(self, row: int) -> dict[str, Any]:
        clip = self.clips[row]
        frames, texts = self.frames(clip), clip.texts
        return {"frames": frames, "text": texts[int(torch.randint(len(texts), ()))]}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [sample["text"] for sample in samples]
        limits = {"padding": "max_length", "truncation": True, "max_length": self.context}
        tokens = self.tokenizer(texts, return_tensors="pt", **limits)
        pixels = collate_clips([sample["frames"] for sample in samples], self.processor)
        return {"pixel_values_videos": pixels, **tokens, "labels": torch.tensor([text_label(text) for text in texts])}


class JointBatches(Batches):
    """Each step a batch of clips or one of pictures, as `image_first` and `image_share` say.

    pictures: of this rank too; they are gone through in an order of their own. The others are those of `Batches`.
    """

    def __init__(self, arguments: RetrievalArguments, *parts: Any, pictures: Batches, **ranks: int) -> None:
        super().__init__(arguments, *parts, **ranks)
        self.pictures, self.share = pictures, arguments.image_share
        self.first = round(arguments.image_first * len(self))

    def steps_of_pictures(self, step: int) -> int:
        """How many of the steps before this one are of pictures."""
        return min(step, self.first) + int(max(0, step - self.first) * self.share)

    def __getitem__(self, step: int) -> dict[str, Any]:
        before = self.steps_of_pictures(step)
        if self.steps_of_pictures(step + 1) > before:
            return self.pictures[before]
        return super().__getitem__(step - before)


def contrast(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """UniCL over the clips and texts of all ranks."""
    labels = inputs["labels"]
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    loss = global_unicl_loss(outputs.video_embeds, outputs.text_embeds, labels, outputs.logit_scale)
    return loss, {"logit_scale": outputs.logit_scale.detach()}


def read_pictures(arguments: RetrievalArguments) -> list[Clip]:
    """The pictures as clips of one frame."""
    pictures = read_captions(arguments.image_data, arguments.image_split or None)
    return [Clip(each.file, str(each.file), texts=each.captions, film=str(each.file), strip=1) for each in pictures]


def make_batches(
    arguments: RetrievalArguments, clips: Sequence[Clip], processor: FlorenceVideoProcessor, *parts: Any, **ranks: int
) -> Batches:
    """Batches of clips, joined by those of pictures if the arguments name some; the rest is what `Batches` takes."""
    if not arguments.image_data:
        return Batches(arguments, clips, processor, *parts, **ranks)
    one_frame = make_processor(replace(arguments, num_frames=1), processor.crop_size["height"])
    pictures = Batches(arguments, read_pictures(arguments), one_frame, *parts, **ranks)
    return JointBatches(arguments, clips, processor, *parts, pictures=pictures, **ranks)


def build_model(arguments: RetrievalArguments, tokenizer: FlorenceTokenizer) -> FlorenceForVideoTextRetrieval:
    """A dual encoder of clips: new, for this tokenizer; made of one of pictures; or going on from one."""
    if arguments.size:
        tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        text = FlorenceTextConfig.from_size(arguments.size, **tokens)
        shape = FlorenceConfig.from_size(arguments.size, text_config=text)
        return FlorenceForVideoTextRetrieval(FlorenceVideoTextConfig.from_dual_encoder(shape, **arguments.shape))
    kind = json.loads((arguments.source / "config.json").read_text("utf-8")).get("model_type")
    if kind == FlorenceVideoTextConfig.model_type:
        return FlorenceForVideoTextRetrieval.from_pretrained(arguments.source, dtype=torch.float32)
    return FlorenceForVideoTextRetrieval.from_pretrained_image(arguments.source, **arguments.shape)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(RetrievalArguments, sys.argv[1:] if argv is None else argv)
    accelerator = arguments.make_accelerator()
    train, held_out = map(with_texts, read_sets(arguments))
    accelerator.print(f"{len(train)} clips to train on, {len(held_out)} to evaluate on")
    tokenizer = FlorenceTokenizer.from_pretrained(arguments.source)
    model = build_model(arguments, tokenizer)
    processor = make_processor(arguments, model.config.video_config.image_size)

    def evaluate(plain: FlorenceForVideoTextRetrieval) -> dict[str, Any]:
        scores = evaluate_video_retrieval(plain, processor, tokenizer, held_out, batch_size=arguments.batch_size)
        for side in ("text_to_video", "video_to_text"):
            recalls = ", ".join(f"recall at {k} {scores[f'{side}_recall_{k}']:.1%}" for k in (1, 5, 10))
            tqdm.write(f"{side.replace('_', ' ')}: {recalls}, median rank {scores[f'{side}_median_rank']:g}")
        return scores

    def save(plain: FlorenceForVideoTextRetrieval, folder: Path) -> None:
        for part in (plain, processor, tokenizer):
            part.save_pretrained(folder)

    if arguments.epochs == 0:
        return evaluate(model)
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    batches = make_batches(arguments, train, processor, model, tokenizer, **ranks)
    groups = parameter_groups(model, arguments.weight_decay, arguments.rates, learning_rate=arguments.learning_rate)
    options = {"save": save, "evaluate": evaluate, "best": "recall_sum", "record": {"clips": len(train)}}
    return fine_tune(arguments, accelerator, model, groups, batches, **options, compute_loss=contrast)


if __name__ == "__main__":
    main()
