"""Frames of clips: read, augmented by torchvision alike in all frames of a clip, normalised, mixed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers.video_utils import VideoMetadata

from ..image_processing_shared import OWN_SETTINGS
from ..video_processing_florence import FlorenceVideoProcessor, sample_frame_indices
from .video import Clip


def open_clip(clip: Clip, processor: FlorenceVideoProcessor) -> Path | bytes | np.ndarray:
    """What the video processor takes: a video as it is, a filmstrip as uint8 (frames, height, width, 3).

    Raises:
        ValueError: a filmstrip that cannot be read, or that its number of frames does not divide.
    """
    if not clip.strip:
        return clip.source
    settings = {name: getattr(processor, name) for name in OWN_SETTINGS}
    picture = processor.read_picture(clip.source, f"filmstrip {clip.name}", **settings)  # (3, frames * height, width)
    if picture.shape[1] % clip.strip:
        raise ValueError(f"{clip.name}: expected {clip.strip} frames of one height, got {picture.shape[1]} rows")
    return picture.permute(1, 2, 0).unflatten(0, (clip.strip, -1)).numpy()


def read_frames(
    clip: Clip, processor: FlorenceVideoProcessor, generator: np.random.Generator | None = None
) -> torch.Tensor:
    """Frames of a clip, as many and by the rule that the processor says, at their own size.

    Args:
        generator: for training: frames are drawn at random, see `sample_frame_indices`.

    Returns:
        uint8 (num_frames, 3, height, width).

    Raises:
        ValueError: a file that cannot be read, see `open_clip`.
    """

    def choose(metadata: VideoMetadata) -> np.ndarray:
        how = (processor.num_frames, processor.sampling, processor.frame_stride)
        return sample_frame_indices(metadata.total_num_frames, *how, generator=generator)[0]

    opened = open_clip(clip, processor)
    if isinstance(opened, np.ndarray):
        frames = opened[choose(VideoMetadata(total_num_frames=len(opened)))]
    else:
        frames = processor.decode(opened, choose, {})[0]
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def training_transforms(
    size: int, *, scale: tuple[float, float] = (0.4, 1.0), rand_augment: int = 0, magnitude: int = 7, flip: bool = True
) -> v2.Compose:
    """Augmentation of a clip, uint8 (frames, 3, height, width) -> (frames, 3, size, size): the same in every frame.

    Random choices come from torch's generator, once a clip.

    Args:
        size: of the square, in pixels.
        scale: part of the picture's area that the random crop keeps, from and to.
        rand_augment: how many of RandAugment's operations one clip goes through; 0 for none.
        magnitude: of these operations, 0 to 30.
        flip: whether half of the clips are mirrored; not where left and right make the class.

    Raises:
        ValueError: a scale or a magnitude out of range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < from <= to <= 1, got {scale}")
    if not 0 <= magnitude <= 30:
        raise ValueError(f"magnitude: expected 0 to 30, got {magnitude}")
    steps: list[v2.Transform] = [v2.RandomResizedCrop(size, scale=scale, antialias=True)]
    if flip:
        steps.append(v2.RandomHorizontalFlip())
    if rand_augment:
        steps.append(v2.RandAugment(rand_augment, magnitude))
    return v2.Compose(steps)


def augment_clip(transforms: v2.Compose, frames: torch.Tensor) -> torch.Tensor:
    """Frames of one clip, uint8 (frames, 3, height, width), through transforms that take them as one video."""
    return transforms(tv_tensors.Video(frames)).as_subclass(torch.Tensor)


def collate_clips(clips: Sequence[torch.Tensor], processor: FlorenceVideoProcessor) -> torch.Tensor:
    """Augmented clips, uint8 (frames, 3, height, width) each -> normalised (batch, frames, 3, height, width)."""
    pixels = torch.stack(list(clips))
    mean, std = list(processor.image_mean), list(processor.image_std)
    return v2.functional.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), mean, std)


def mix_clips(
    pixels: torch.Tensor, labels: torch.Tensor, num_classes: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al. 2018): each clip with its neighbour in the batch, by one share of a beta distribution.

    It is torchvision's, whose random numbers come from torch's generator as all others of a recipe, and not timm's,
    whose come from numpy's. Label smoothing is the model's.

    Args:
        pixels: (batch, frames, 3, height, width), floating.
        labels: (batch,), class numbers.
        alpha: both parameters of the distribution, above 0.

    Returns:
        The mixed clips, and labels (batch, num_classes), float32.
    """
    mixed, soft = v2.MixUp(alpha=alpha, num_classes=num_classes)(tv_tensors.Video(pixels), labels)
    return mixed.as_subclass(torch.Tensor), soft.float()


def make_views(
    clips: Sequence[Clip], processor: FlorenceVideoProcessor, num_clips: int = 1, num_crops: int = 1
) -> torch.Tensor:
    """Clips as they are evaluated: (batch, num_clips * num_crops, frames, 3, height, width), normalised.

    Raises:
        ValueError: as `open_clip` and `FlorenceVideoProcessor.views`.
    """
    views = [
        processor.views(open_clip(clip, processor), num_clips, num_crops, input_data_format="channels_last")
        for clip in clips
    ]
    return torch.cat([each["pixel_values_videos"] for each in views])


__all__ = [
    "augment_clip",
    "collate_clips",
    "make_views",
    "mix_clips",
    "open_clip",
    "read_frames",
    "training_transforms",
]
