# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's video processor: clips from files and memory, which of their frames are taken, and how views are cut."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ChannelDimension
from transformers.processing_utils import Unpack, VideosKwargs
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata, make_batched_metadata

from .image_checks import channel_axis, to_eight_bits
from .image_processing_shared import OWN_SETTINGS, PictureDoor, check_settings
from .video_decoding import DECODE_BYTES, DECODE_SECONDS, FlorenceVideoError, check_decoding, read_video

SAMPLINGS = ("uniform", "dense", "segment")


def check_sampling(sampling: Any, **counts: Any) -> None:
    """Refuse a sampling that is none of `SAMPLINGS`, and counts that are no positive integers, by their names."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling: expected one of {', '.join(SAMPLINGS)}, got {sampling!r}")


def sample_frame_indices(
    total: int,
    num_frames: int,
    sampling: str = "uniform",
    frame_stride: int = 1,
    num_clips: int = 1,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Which frames of a video to take.

    - `"uniform"`: the video in `num_frames` equal parts, the first frame of each (transformers' own way). Several
      clips begin one after the other inside the part, evenly.
    - `"segment"`: the same parts, the frame in the middle of each (TSN; Video Swin on Something-Something). Several
      clips take the middles of as many equal pieces of each part.
    - `"dense"`: every `frame_stride`-th frame of a stretch (Video Swin on Kinetics: 32 frames, every second). Of the
      places where a stretch fits, each clip takes the one in the middle of its share.

    A video of fewer frames than are asked for repeats: evenly, each frame several times, in the first two; from the
    start again, as a loop, where a dense stretch runs past the end.

    Args:
        total: frames of the video.
        num_frames: frames of a clip.
        sampling, frame_stride: see above.
        num_clips: clips of the video.
        generator: for training: what is the first or the middle above is drawn at random instead, anew for each part
            of `"segment"`, once a clip for the others.

    Returns:
        int64 (num_clips, num_frames), from 0 to total - 1.

    Raises:
        ValueError: a number below 1, or another sampling.

    Example:
        >>> sample_frame_indices(10, 4, "segment")
        array([[1, 3, 6, 8]])
    """
    check_sampling(sampling, total=total, num_frames=num_frames, frame_stride=frame_stride, num_clips=num_clips)
    clips, parts = np.arange(num_clips)[:, None], np.arange(num_frames)[None]
    if sampling == "dense":
        places = max(total - num_frames * frame_stride + 1, 0) / num_clips  # where a stretch fits, for each clip
        inside = places / 2.0 if generator is None else places * generator.random((num_clips, 1))
        first = (clips * places + inside).astype(np.int64)
        return (first + parts * frame_stride) % total
    if generator is not None:
        draws = generator.random((num_clips, num_frames if sampling == "segment" else 1))
        position = (parts + (clips + draws) / num_clips) * (total / num_frames)
        return np.minimum(position.astype(np.int64), total - 1)
    # In integers, as no frame may depend on how a quotient is rounded: the position is (part + (clip + half) / clips).
    half = 1 if sampling == "segment" else 0
    return (2 * (parts * num_clips + clips) + half) * total // (2 * num_frames * num_clips)


class FlorenceVideoProcessorKwargs(VideosKwargs, total=False):  # type: ignore[call-arg]  # seen as an untyped class
    """Settings of the video processor: those of transformers, and these; all are saved with the processor.

    Attributes:
        sampling: `"uniform"`, `"segment"` or `"dense"`, see `sample_frame_indices`.
        frame_stride: of dense sampling, from one frame taken to the next.
        max_pixels, max_aspect_ratio, matte: of each frame, see `FlorenceImageProcessorKwargs`.
        decode_backend, decode_seconds, decode_bytes: of video files, `backend`, `max_seconds` and `max_bytes` of
            `read_video`.
    """

    sampling: str | None
    frame_stride: int | None
    decode_backend: str | None
    decode_seconds: float | int | None
    decode_bytes: int | None
    max_pixels: int | None
    max_aspect_ratio: float | int | None
    matte: list[int] | tuple[int, ...] | None


DECODING = ("decode_backend", "decode_seconds", "decode_bytes")
FILES = (str, Path, bytes)
# What each frame has in common with a picture.
SHARED_SETTINGS = (
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor"),
    *("do_normalize", "image_mean", "image_std", "do_convert_rgb", *OWN_SETTINGS),
)


def flatten_clips(videos: Any) -> list[Any]:
    """A clip, or a batch of them -> the list of single clips: arrays of four axes, lists of frames, or video files.

    Raises:
        ValueError: there is no clip, or something is none.
    """
    if isinstance(videos, np.ndarray | torch.Tensor):
        if videos.ndim not in (4, 5):
            raise ValueError(f"expected a clip of 4 axes or a batch of 5, got shape {tuple(videos.shape)}")
        clips = [videos] if videos.ndim == 4 else list(videos)
    elif isinstance(videos, FILES):
        clips = [videos]
    elif not isinstance(videos, list | tuple):
        raise ValueError(f"expected clips as video files, arrays or lists of pictures, got {type(videos).__name__}")
    elif videos and all(isinstance(item, Image.Image) or getattr(item, "ndim", 0) in (2, 3) for item in videos):
        clips = [list(videos)]
    else:
        clips = []
        for item in videos:
            pictures = isinstance(item, list | tuple) and item and isinstance(item[0], str | Path)
            clips += [list(item)] if pictures else flatten_clips(item)
    if not clips or any(not isinstance(clip, FILES) and len(clip) == 0 for clip in clips):
        raise ValueError("expected at least one clip of at least one frame, got an empty one")
    return clips


class FlorenceVideoProcessor(PictureDoor, BaseVideoProcessor):
    """Turns clips into `pixel_values_videos (batch, frames, 3, height, width)` float32, frame by frame as pictures.

    The defaults are the image processor's: shortest edge to 256 (bicubic), the middle 224x224, values to 0..1,
    ImageNet's mean and deviation. `num_frames` of each clip are taken, as `sampling` says.

    A clip is the path, http(s) URL or bytes of a video file, see `read_video`; an array or tensor of frames,
    `(frames, height, width)` grey or with 1, 3 or 4 channels, last or second axis (`input_data_format` must say which
    where both can be); or a list of frames: `PIL.Image.Image`, arrays, or, in a list of such lists, paths of pictures.
    Frames in memory that are not taken are not looked at. What holds for one picture, see `FlorenceImageProcessor`,
    holds for each frame; the scale of floating-point values is one for the frames taken together. Frames of one clip
    have one size. Anything else is a `ValueError`; where a file is at fault, a `FlorenceVideoError`.

    transformers' `video-classification` pipeline takes paths, URLs and arrays, one or a list of them; with a
    `batch_size` it looks for an image processor, so save a `FlorenceImageProcessor` beside.

    Args:
        kwargs: see `FlorenceVideoProcessorKwargs`; `size` is `{"shortest_edge": n}` or `{"height": n, "width": n}`.

    Example:
        >>> clip = np.zeros((50, 90, 120, 3), dtype=np.uint8)
        >>> FlorenceVideoProcessor(num_frames=8)(clip, return_tensors="pt")["pixel_values_videos"].shape
        torch.Size([1, 8, 3, 224, 224])
    """

    valid_kwargs = FlorenceVideoProcessorKwargs
    model_input_names = ["pixel_values_videos"]
    do_sample_frames = True
    num_frames = 32
    sampling = "uniform"
    frame_stride = 1
    decode_backend = "pyav"
    decode_seconds = DECODE_SECONDS
    decode_bytes = DECODE_BYTES

    def __init__(self, **kwargs: Unpack[FlorenceVideoProcessorKwargs]):
        super().__init__(**kwargs)
        check_decoding(self.decode_backend, self.decode_seconds, self.decode_bytes)
        check_sampling(self.sampling, num_frames=self.num_frames, frame_stride=self.frame_stride)

    @classmethod
    def from_image_processor(
        cls, image_processor: PictureDoor, **settings: Unpack[FlorenceVideoProcessorKwargs]
    ) -> "FlorenceVideoProcessor":
        """For the video tower that an image tower is inflated to: each frame as that tower's pictures are prepared.

        settings: others than the image processor's, such as `num_frames`.
        """
        taken = {name: getattr(image_processor, name) for name in SHARED_SETTINGS}
        taken |= {name: dict(taken[name]) for name in ("size", "crop_size") if taken[name] is not None}
        return cls(**{**taken, **settings})

    def sample_frames(
        self,
        metadata: VideoMetadata,
        num_frames: int | None = None,
        fps: float | None = None,
        sampling: str | None = None,
        frame_stride: int | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Frames of a video to take, int64 `(num_frames,)`; what is None is the processor's own.

        `fps` frames for each second of the video stand in for `num_frames`; its metadata must then tell its own.
        """
        if fps is not None:
            if num_frames is not None or not metadata.fps:
                raise ValueError("fps: expected no num_frames beside it, and a video whose metadata tells its own fps")
            num_frames = max(1, int(metadata.total_num_frames / metadata.fps * fps))
        return sample_frame_indices(
            metadata.total_num_frames,
            self.num_frames if num_frames is None else num_frames,
            self.sampling if sampling is None else sampling,
            self.frame_stride if frame_stride is None else frame_stride,
        )[0]

    def decode(
        self, video: str | Path | bytes, indices_of: Callable[[VideoMetadata], np.ndarray], settings: dict[str, Any]
    ) -> tuple[np.ndarray, VideoMetadata]:
        """Frames of a video file under the settings of a call, see `read_video`; what is unset is the processor's."""
        backend, seconds, size, pixels, ratio = (
            getattr(self, name) if settings.get(name) is None else settings[name]
            for name in (*DECODING, "max_pixels", "max_aspect_ratio")
        )
        return read_video(
            video,
            indices_of,
            max_pixels=pixels,
            max_aspect_ratio=ratio,
            backend=backend,
            max_seconds=seconds,
            max_bytes=size,
        )

    def fetch_videos(self, video_url_or_urls: Any, sample_indices_fn: Callable[..., np.ndarray] | None = None) -> Any:
        """As in transformers, which calls this for chats: frames and metadata of a video file, or lists of both."""
        if isinstance(video_url_or_urls, list):
            return list(zip(*[self.fetch_videos(each, sample_indices_fn) for each in video_url_or_urls], strict=True))

        def indices_of(metadata: VideoMetadata) -> np.ndarray:
            if sample_indices_fn is None:
                return np.arange(metadata.total_num_frames)
            return np.asarray(sample_indices_fn(metadata=metadata))

        return self.decode(video_url_or_urls, indices_of, {})

    def read_clip(self, clip: Any, name: str, indices: np.ndarray, **settings: Any) -> torch.Tensor:
        """Frames of one clip under all the settings of a call -> uint8 `(len(indices), 3, height, width)`.

        Floating-point arrays with `do_rescale=False` stay as they are, in float32. Errors call the clip `name`.
        """
        taken, places = np.unique(indices, return_inverse=True)
        frames: Any = [clip[int(number)] for number in taken]
        try:
            if all(isinstance(frame, np.ndarray | torch.Tensor) for frame in frames):
                frames = self.same_scale(frames, settings)
                settings["input_data_format"] = ChannelDimension.FIRST
            pictures = [
                self.read_picture(frame, f"frame {number}", **settings)
                for number, frame in zip(taken, frames, strict=True)
            ]
            sizes = sorted({tuple(picture.shape[1:]) for picture in pictures})
            if len(sizes) > 1:
                raise ValueError(f"expected frames of one size (height, width), got {sizes}")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return torch.stack(pictures)[torch.from_numpy(places)]

    def same_scale(self, frames: list[np.ndarray | torch.Tensor], settings: dict[str, Any]) -> list[torch.Tensor]:
        """Frames as arrays -> (channels, height, width) each, in 8-bit levels unless `do_rescale` is off.

        Whether floating-point values lie in 0..1 or in 0..255 is seen from all frames: a black one does not tell.
        """
        if len({tuple(frame.shape) for frame in frames}) > 1 or frames[0].ndim not in (2, 3):
            raise ValueError(f"expected frames of one shape, got {sorted({tuple(frame.shape) for frame in frames})}")
        if isinstance(frames[0], np.ndarray):
            stacked = np.stack(frames)
            if stacked.dtype.kind not in "buif":
                raise ValueError(f"expected an array of booleans, integers or real numbers, got dtype {stacked.dtype}")
            dtype = np.dtype(np.float64) if stacked.dtype == np.longdouble else stacked.dtype.newbyteorder("=")
            pixels = torch.from_numpy(np.require(stacked, dtype, ["C", "W"]))
        else:
            pixels = torch.stack([torch.as_tensor(frame).detach() for frame in frames])
        pixels = to_eight_bits(pixels, bool(settings.get("do_rescale", True)))
        if pixels.ndim == 3:
            return list(pixels[:, None])
        axis = channel_axis(tuple(pixels.shape[1:]), settings.get("input_data_format"))
        return list(pixels.movedim(1 + axis, 1))

    def read_clips(
        self, videos: Any, indices_of: Callable[[VideoMetadata], np.ndarray], settings: dict[str, Any]
    ) -> tuple[list[torch.Tensor], list[VideoMetadata]]:
        """All clips of a call, and what is known of them; `indices_of`: from metadata to the frames to take."""
        clips = flatten_clips(videos)
        known = settings.pop("video_metadata", None)
        if known is None:
            known = [{"total_num_frames": 1} for _ in clips]
        metadata = make_batched_metadata(clips, known)
        read = []
        for number, clip in enumerate(clips):
            own = dict(settings)
            if isinstance(clip, FILES):
                try:
                    clip, metadata[number] = self.decode(clip, indices_of, settings)
                except FlorenceVideoError as error:
                    raise FlorenceVideoError(f"clip {number}: {error}") from error
                taken, own["input_data_format"] = np.arange(len(clip)), ChannelDimension.LAST
            else:
                metadata[number].total_num_frames = len(clip)
                metadata[number].frames_indices = taken = indices_of(metadata[number])
            read.append(self.read_clip(clip, f"clip {number}", taken, **own))
            metadata[number].height, metadata[number].width = read[-1].shape[2:]
        return read, metadata

    def preprocess(  # type: ignore[override]  # transformers' name for the clips
        self, videos: Any, *args: Any, **kwargs: Unpack[FlorenceVideoProcessorKwargs]
    ) -> BatchFeature:
        """Clips -> `pixel_values_videos`; all that transformers' processors take.

        Raises:
            ValueError: a clip or a setting is refused; FlorenceVideoError: it is a video file that cannot be read.
            ImportError: there is a video file, and what decodes it is not installed.
        """
        names = ("do_convert_rgb", "do_rescale", *OWN_SETTINGS, *DECODING)
        settings = {name: getattr(self, name) if kwargs.get(name) is None else kwargs[name] for name in names}
        settings |= {name: kwargs.pop(name, None) for name in ("input_data_format", "video_metadata")}
        unset = dict.fromkeys(("size", "crop_size", "image_mean", "image_std"))
        check_settings({**unset, **{name: settings[name] for name in OWN_SETTINGS}})
        how = {name: kwargs.pop(name, None) for name in ("num_frames", "fps", "sampling", "frame_stride")}
        sampled = kwargs.pop("do_sample_frames", None)

        def indices_of(metadata: VideoMetadata) -> np.ndarray:
            if self.do_sample_frames if sampled is None else sampled:
                return self.sample_frames(metadata, **how)
            return np.arange(metadata.total_num_frames)

        clips, metadata = self.read_clips(videos, indices_of, settings)
        return super().preprocess(
            clips,
            *args,
            **kwargs,
            video_metadata=metadata,
            do_sample_frames=False,
            do_convert_rgb=False,
            input_data_format=ChannelDimension.FIRST,
        )

    def views(
        self, videos: Any, num_clips: int = 4, num_crops: int = 3, **kwargs: Unpack[FlorenceVideoProcessorKwargs]
    ) -> BatchFeature:
        """Clips x crops of each video for multi-view testing (Florence section 3.9: 4 x 3).

        The shortest edge is resized to the crop's; three crops are the two ends and the middle of the longer side.

        Args:
            videos: what `preprocess` takes; all of one size.
            num_clips: clips of a video, see `sample_frame_indices`.
            num_crops: 1 or 3.
            kwargs: what `preprocess` takes, but `size` and `do_sample_frames`.

        Returns:
            `pixel_values_videos`: (batch, num_clips * num_crops, frames, 3, height, width), for
            `FlorenceForVideoClassification.classify_views`.

        Raises:
            ValueError, ImportError: as `preprocess`.
        """
        if num_crops not in (1, 3):
            raise ValueError(f"num_crops: expected 1 or 3, got {num_crops!r}")
        fixed = sorted(kwargs.keys() & {"size", "fps", "do_resize", "do_center_crop", "do_sample_frames"})
        if fixed:
            raise ValueError(f"expected views without settings of their own for {', '.join(fixed)}, got some")
        how = {}
        for name in ("num_frames", "sampling", "frame_stride"):
            given = kwargs.pop(name, None)
            how[name] = getattr(self, name) if given is None else given
        crop = kwargs.pop("crop_size", None) or self.crop_size
        height, width = crop["height"], crop["width"]
        clips = []

        def indices_of(metadata: VideoMetadata) -> np.ndarray:
            return sample_frame_indices(metadata.total_num_frames, num_clips=num_clips, **how).flatten()

        for clip in flatten_clips(videos):
            if isinstance(clip, FILES):
                clips.append(list(self.decode(clip, indices_of, dict(kwargs))[0]))
            else:
                clips.append([clip[int(number)] for number in indices_of(VideoMetadata(len(clip)))])
        batch = self.preprocess(
            clips,
            **{**kwargs, "return_tensors": "pt"},
            do_sample_frames=False,
            do_center_crop=False,
            size={"shortest_edge": max(height, width)},
        )
        pixels = batch["pixel_values_videos"].unflatten(1, (num_clips, -1))
        spare = (pixels.shape[-2] - height, pixels.shape[-1] - width)
        steps = (0, 1, 2) if num_crops == 3 else (1,)
        crops = []
        for step in steps:
            # The middle, or along the longer side the start, the middle and twice as far (Video Swin's three crops).
            top, left = (space // 2 * (step if space == max(spare) else 1) for space in spare)
            crops.append(pixels[..., top : top + height, left : left + width])
        return BatchFeature({"pixel_values_videos": torch.stack(crops, dim=2).flatten(1, 2)})


__all__ = ["FlorenceVideoProcessor", "FlorenceVideoProcessorKwargs", "sample_frame_indices"]
