"""What both video recipes share: where the clips are, which frames are taken, and the shape of the video tower."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from transformers.utils import VIDEO_PROCESSOR_NAME

from transformers_florence import FlorenceImageProcessor, FlorenceVideoProcessor, bundled_checkpoint
from transformers_florence.data.video import FORMATS, Clip, read_clips, split_by_film
from transformers_florence.data.video_transforms import augment_clip, read_frames, training_transforms
from transformers_florence.training.recipe import RecipeArguments, StepBatches
from transformers_florence.video_processing_florence import SAMPLINGS


@dataclass
class VideoArguments(RecipeArguments):
    """What a run on clips is made of besides what every recipe is told."""

    batch_size: int = 8
    data: str = "videos"  # folder, or list: see `data.video.read_clips`
    data_format: str = "folders"  # folders, kinetics, msrvtt, ucf101, filmstrips or shards
    root: str = ""  # folder of the videos of a list; that of the list if empty
    train_split: str = ""  # of filmstrips and shards
    eval_data: str = ""  # the same for evaluation; if empty, films of `data` are held out
    eval_split: str = ""
    held_out: float = 0.25  # share of the clips in these films
    label_column: str = ""  # of shards
    text_column: str = ""  # of shards
    init_from: str = ""  # checkpoint with an image tower, or one of a former run; the bundled one if empty
    size: str = ""  # of new weights, instead of a checkpoint
    num_frames: int = 8
    sampling: str = "segment"  # uniform, segment or dense
    frame_stride: int = 1  # of dense sampling
    temporal_stride: int = 2  # frames that become one token of time
    temporal_window_size: int = 4  # tokens; with 1, and a stride of 1, it is the image tower frame by frame
    temporal_mode: str = "windows"  # windows or divided
    image_size: int = 0  # side of the pictures, pixels; 0 for the checkpoint's
    backbone_rate: float = 0.2  # learning rate of pretrained towers, relative to the others'
    time_rate: float = 10.0  # learning rate of position tables, relative to the others': inflated, they know no order
    crop_scale: float = 0.4  # least part of the area that a random crop keeps
    flip: bool = True  # mirror half of the clips; not where left and right matter
    rand_augment: int = 0  # operations of RandAugment on a clip
    magnitude: int = 7  # of these operations

    from_zero: ClassVar = (*RecipeArguments.from_zero, "image_size", "rand_augment", "magnitude")
    choices: ClassVar = {
        **RecipeArguments.choices,
        "data_format": FORMATS,
        "sampling": SAMPLINGS,
        "temporal_mode": ("windows", "divided"),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size and self.init_from:
            raise ValueError(f"expected size or init_from, got both, {self.size!r} and {self.init_from!r}")

    @property
    def source(self) -> Path:
        """The checkpoint to start from."""
        return Path(self.init_from or bundled_checkpoint())

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates by parts of names, the first that fits, see `parameter_groups`.

        An inflated tower takes every order of frames for the same: its tables are equal at all times. AdamW moves a
        number by its rate a step, whatever its gradient, and these have to move by as much as attention feels.
        """
        rate = self.learning_rate
        own = {"relative_position_bias_table": self.time_rate * rate, "temporal_": rate}
        return own if self.size else {**own, "_model.": self.backbone_rate * rate}

    @property
    def shape(self) -> dict[str, Any]:
        """Fields of the video tower's configuration."""
        names = ("num_frames", "temporal_stride", "temporal_window_size", "temporal_mode")
        return {name: getattr(self, name) for name in names}


def read_sets(arguments: VideoArguments) -> tuple[Sequence[Clip], Sequence[Clip]]:
    """The clips to train on and those to evaluate on.

    Raises:
        ValueError: what the readers refuse, or too few films to hold some out.
    """
    columns = {"root": arguments.root, "label": arguments.label_column, "text": arguments.text_column}
    train = read_clips(arguments.data_format, arguments.data, split=arguments.train_split, **columns)
    if not arguments.eval_data and not arguments.eval_split:
        return split_by_film(train, arguments.held_out, arguments.seed)
    held_out = arguments.eval_data or arguments.data
    return train, read_clips(arguments.data_format, held_out, split=arguments.eval_split, **columns)


def make_processor(arguments: VideoArguments, image_size: int | Sequence[int]) -> FlorenceVideoProcessor:
    """The processor of a run: the frames that it says, squares, the normalisation of the checkpoint.

    image_size: of the model, for runs that do not say another.
    """
    side = arguments.image_size or (image_size if isinstance(image_size, int) else min(image_size))
    if arguments.size:
        former: FlorenceImageProcessor | FlorenceVideoProcessor = FlorenceImageProcessor()
    elif (arguments.source / VIDEO_PROCESSOR_NAME).is_file():  # of a former run
        former = FlorenceVideoProcessor.from_pretrained(arguments.source)
    else:
        former = FlorenceImageProcessor.from_pretrained(arguments.source)
    return FlorenceVideoProcessor.from_image_processor(
        former,
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_center_crop=True,
        num_frames=arguments.num_frames,
        sampling=arguments.sampling,
        frame_stride=arguments.frame_stride,
    )


class ClipBatches(StepBatches):
    """Augmented clips; what goes with them is up to the recipe."""

    def __init__(
        self,
        arguments: VideoArguments,
        clips: Sequence[Clip],
        processor: FlorenceVideoProcessor,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(clips), rank, ranks)
        self.clips, self.processor = clips, processor
        self.transforms = training_transforms(
            processor.crop_size["height"],
            scale=(arguments.crop_scale, 1.0),
            rand_augment=arguments.rand_augment,
            magnitude=arguments.magnitude,
            flip=arguments.flip,
        )

    def name(self, row: int) -> str:
        return self.clips[row].name

    def frames(self, clip: Clip) -> torch.Tensor:
        """Random frames of a clip, augmented: uint8 (frames, 3, side, side)."""
        generator = np.random.default_rng(int(torch.randint(1 << 31, ())))
        return augment_clip(self.transforms, read_frames(clip, self.processor, generator))
