"""The video processor: sampling against transformers' and slow references, pixels against the image processor."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForVideoClassification,
    AutoVideoProcessor,
    pipeline,
)
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from tests.oracles import randomize
from tests.tiny_videos import frames, require_av, write_video
from transformers_florence.configuration_florence_video import FlorenceVideoConfig
from transformers_florence.image_processing_florence import FlorenceImageProcessor
from transformers_florence.integrity import verify_checkpoint
from transformers_florence.modeling_florence_video import FlorenceForVideoClassification
from transformers_florence.video_decoding import FlorenceVideoError
from transformers_florence.video_processing_florence import FlorenceVideoProcessor, sample_frame_indices

TOTALS = (1, 2, 7, 8, 31, 32, 63, 64, 65, 100, 301)
COUNTS = (1, 2, 3, 8, 32)
SMALL = {"size": {"shortest_edge": 24}, "crop_size": {"height": 16, "width": 16}}


def processor(**settings: Any) -> FlorenceVideoProcessor:
    return FlorenceVideoProcessor(**{**SMALL, "num_frames": 4, **settings})


def pixels(videos: Any, **settings: Any) -> torch.Tensor:
    return processor()(videos, return_tensors="pt", **settings)["pixel_values_videos"]


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("count", COUNTS)
def test_uniform_is_transformers_own(count):
    for total in (total for total in TOTALS if total >= count):
        expected = default_sample_indices_fn(VideoMetadata(total_num_frames=total), num_frames=count)
        assert sample_frame_indices(total, count).tolist() == [expected.tolist()]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("clips", [1, 2, 5])
def test_uniform_and_segment_by_exact_fractions(count, clips):
    """Each part's first frame, or the one in the middle; several clips share each part."""
    for total in TOTALS:
        for sampling, half in (("uniform", Fraction(0)), ("segment", Fraction(1, 2))):
            indices = sample_frame_indices(total, count, sampling, num_clips=clips)
            for clip in range(clips):
                for part in range(count):
                    position = (part + (clip + half) / Fraction(clips)) * Fraction(total, count)
                    assert indices[clip, part] == position.__floor__(), (total, sampling, clip, part)


@pytest.mark.parametrize("count, stride", [(32, 2), (8, 1), (4, 5), (1, 1)])
@pytest.mark.parametrize("clips", [1, 4, 10])
def test_dense_is_video_swins(count, stride, clips):
    """By its rule, a frame at a time: the middle of each clip's share of the places, looped where it is too short."""
    for total in TOTALS:
        expected = []
        share = (total - count * stride + 1) / float(clips)
        for clip in range(clips):
            start = int(clip * share + share / 2.0) if total > count * stride - 1 else 0
            expected.append([(start + number * stride) % total for number in range(count)])
        assert sample_frame_indices(total, count, "dense", stride, clips).tolist() == expected


def test_short_clips_repeat():
    assert sample_frame_indices(3, 6).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert sample_frame_indices(3, 6, "segment").tolist() == [[0, 0, 1, 1, 2, 2]]
    assert sample_frame_indices(3, 6, "dense", 1).tolist() == [[0, 1, 2, 0, 1, 2]]
    assert sample_frame_indices(3, 4, "dense", 2).tolist() == [[0, 2, 1, 0]]


def test_random_frames_keep_the_rule():
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(300):
        (dense,) = sample_frame_indices(20, 4, "dense", 3, generator=rng)
        assert (np.diff(dense) == 3).all() and 0 <= dense[0] <= 20 - 12
        starts.add(int(dense[0]))
        (segment,) = sample_frame_indices(20, 4, "segment", generator=rng)
        assert (segment // 5).tolist() == [0, 1, 2, 3]
        (uniform,) = sample_frame_indices(20, 4, "uniform", generator=rng)
        assert (np.diff(uniform) == 5).all()
        several = sample_frame_indices(20, 4, "dense", 3, num_clips=3, generator=rng)[:, 0]
        assert (several // 3).tolist() == [0, 1, 2]  # each clip in its third of the 9 places
        assert (sample_frame_indices(1, 4, "segment", generator=rng) == 0).all()
    assert starts == set(range(9))
    first, again, other = (
        sample_frame_indices(99, 8, "segment", generator=np.random.default_rng(s)) for s in (1, 1, 2)
    )
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4), "total: expected a positive integer, got 0"),
        ((4, 0), "num_frames: expected a positive integer, got 0"),
        ((4, 2.0), "num_frames: expected a positive integer, got 2.0"),
        ((4, 2, "dense", 0), "frame_stride: expected a positive integer, got 0"),
        ((4, 2, "uniform", 1, True), "num_clips: expected a positive integer, got True"),
        ((4, 2, "all"), "sampling: expected one of uniform, dense, segment, got 'all'"),
    ],
)
def test_sampling_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        sample_frame_indices(*arguments)


# ---------------------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("sampling, stride", [("uniform", 1), ("segment", 1), ("dense", 2)])
def test_each_frame_is_what_the_image_processor_makes_of_it(sampling, stride):
    clips = [frames(11), frames(9, seed=1), frames(3, seed=2)]
    taken = [sample_frame_indices(len(clip), 4, sampling, stride)[0] for clip in clips]
    expected = FlorenceImageProcessor(**SMALL)(
        [clip[number] for clip, numbers in zip(clips, taken, strict=True) for number in numbers], return_tensors="pt"
    )["pixel_values"].unflatten(0, (3, 4))
    made = pixels(clips, sampling=sampling, frame_stride=stride)
    assert made.dtype == torch.float32
    assert_close(made, expected)
    assert_close(
        processor(sampling=sampling, frame_stride=stride)(clips, return_tensors="pt").pixel_values_videos, made
    )


def test_clips_in_every_form(tmp_path):
    clip = frames(8)
    expected = pixels(clip)
    assert expected.shape == (1, 4, 3, 16, 16) and expected.std() > 0.1
    pictures = [Image.fromarray(frame) for frame in clip]
    paths = [str(tmp_path / f"{number}.png") for number in range(8)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.save(path)
    forms = {
        "list of arrays": list(clip),
        "tensor": torch.from_numpy(clip),
        "channels second": np.ascontiguousarray(clip.transpose(0, 3, 1, 2)),
        "a view backwards": np.ascontiguousarray(clip[::-1])[::-1],
        "pictures": pictures,
        "tuple": tuple(pictures),
        "list of a list": [pictures],
        "paths in a list": [paths],
        "batch of one": clip[None],
        "levels as int64": clip.astype(np.int64),
        "0 to 1": clip / 255,
        "float levels": torch.from_numpy(clip).float(),
        "opaque": np.concatenate([clip, np.full((8, 30, 40, 1), 255, np.uint8)], axis=-1),
    }
    for form, videos in forms.items():
        assert_close(pixels(videos), expected, msg=form)
    several = [clip, pictures, torch.from_numpy(clip)]
    assert_close(pixels(several), expected.expand(3, -1, -1, -1, -1))
    assert_close(pixels([several[:2], several[2:]]), expected.expand(3, -1, -1, -1, -1))
    grey = clip[..., :1]
    expected = pixels(grey.repeat(3, axis=-1))
    for videos in (grey, list(grey[..., 0])):
        assert_close(pixels(videos), expected)


def test_one_scale_for_all_frames_of_a_clip():
    """A nearly black frame among bright ones, both in levels as floats: alone it would pass for a bright one."""
    clip = frames(4).astype(np.float32)
    clip[1] = 1.0
    made = pixels(clip, do_sample_frames=False, do_normalize=False)
    assert_close(made[0, 1], torch.full((3, 16, 16), 1 / 255))


def test_values_that_are_scaled_already():
    clip = torch.randn(4, 3, 24, 24)
    made = pixels(clip, do_sample_frames=False, do_rescale=False, do_normalize=False, do_resize=False)
    assert_close(made[0], clip[..., 4:20, 4:20])


def test_all_frames_and_frames_a_second():
    clip = frames(6)
    assert_close(pixels(clip, do_sample_frames=False), pixels(clip, num_frames=6))
    about = VideoMetadata(total_num_frames=6, fps=12.0)
    batch = processor()(clip, fps=6, video_metadata=about, return_metadata=True, return_tensors="pt")
    assert_close(batch["pixel_values_videos"], pixels(clip, num_frames=3))
    (metadata,) = batch["video_metadata"]
    assert list(metadata.frames_indices) == [0, 2, 4] and metadata.timestamps == pytest.approx([0, 1 / 6, 1 / 3])
    assert (metadata.height, metadata.width, metadata.total_num_frames) == (30, 40, 6)
    for settings in ({"fps": 6}, {"fps": 6, "num_frames": 2, "video_metadata": about}):
        with pytest.raises(ValueError, match="fps: expected no num_frames beside it, and a video whose metadata"):
            pixels(clip, **settings)


def test_frames_that_are_not_taken_are_not_looked_at():
    clip: list = [Image.fromarray(frame) for frame in frames(8)]
    clip[1] = Image.new("RGB", (1, 1))
    assert pixels([clip]).shape[1] == 4
    with pytest.raises(
        ValueError, match=r"clip 0: expected frames of one size \(height, width\), got \[\(1, 1\), \(30"
    ):
        pixels([clip], num_frames=8)


@pytest.mark.parametrize(
    "videos, message",
    [
        ("clip.mp4", "clip 0: 'clip.mp4': expected the path of a video .* no such file"),
        (Path("clip.mp4"), "clip 0: 'clip.mp4': expected the path of a video"),
        ([frames(2), "b.mp4"], "clip 1: 'b.mp4': expected the path of a video"),
        (None, "expected clips as video files, arrays or lists of pictures, got NoneType"),
        ([None], "expected clips as video files, arrays or lists of pictures, got NoneType"),
        ([], "at least one clip of at least one frame"),
        ([[]], "at least one clip of at least one frame"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least one clip of at least one frame"),
        (np.zeros((8, 8, 3), np.uint8), r"expected a clip of 4 axes or a batch of 5, got shape \(8, 8, 3\)"),
        (np.zeros((2, 8, 8, 5), np.uint8), "clip 0: expected 1, 3 or 4 channels"),
        (np.zeros((2, 3, 8, 3), np.uint8), "clip 0: expected input_data_format='channels_first' or"),
        (np.full((2, 8, 8, 3), np.nan), "clip 0: expected finite pixel values"),
        (np.full((2, 8, 8, 3), 300), "clip 0: expected integer values in 0..255"),
        (np.full((2, 8, 8, 3), "a"), "clip 0: expected an array of booleans, integers or real numbers"),
        ([frames(2), frames(2) * 1j], "clip 1: expected an array of booleans"),
        ([list(frames(2)) + list(frames(2, width=50))], "clip 0: expected frames of one shape, got"),
        ([["nowhere.png"]], "clip 0: .*nowhere.png"),
    ],
)
def test_what_is_no_clip_is_refused(videos, message):
    with pytest.raises(ValueError, match=message):
        pixels(videos)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_frames": 0}, "num_frames: expected a positive integer, got 0"),
        ({"sampling": "best"}, "sampling: expected one of uniform, dense, segment, got 'best'"),
        ({"frame_stride": -1}, "frame_stride: expected a positive integer, got -1"),
        ({"max_pixels": 100}, "clip 0: frame 0: expected at most 100 pixels, got 40x30"),
        ({"max_pixels": 0}, "max_pixels: expected a positive integer, got 0"),
        ({"image_std": 0.0}, "image_std: expected positive numbers"),
        ({"do_resize": "yes"}, "do_resize"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        pixels(frames(4), **settings)


def test_impossible_settings_are_refused_when_it_is_made():
    for settings, message in (({"num_frames": 0}, "num_frames"), ({"sampling": "best"}, "sampling")):
        with pytest.raises(ValueError, match=message):
            processor(**settings)


# ----------------------------------------------------------------------------------------------------------- views


def test_views_are_clips_and_crops():
    """Frames of 16 x 21 after resizing have room for crops at columns 0, 2 and 4."""
    clip = frames(30)
    views = processor().views([clip, clip[::-1]], num_clips=2, frame_stride=3, sampling="dense")["pixel_values_videos"]
    assert views.shape == (2, 6, 4, 3, 16, 16)
    whole = {"do_center_crop": False, "do_sample_frames": False, "size": {"shortest_edge": 16}}
    for number, indices in enumerate(sample_frame_indices(30, 4, "dense", 3, 2)):
        resized = pixels(clip[indices], **whole)[0]
        assert resized.shape[-2:] == (16, 21)
        for place, left in enumerate((0, 2, 4)):
            assert_close(views[0, 3 * number + place], resized[..., left : left + 16])
    tall = np.ascontiguousarray(clip.transpose(0, 2, 1, 3))
    turned = processor().views(tall, num_clips=1)["pixel_values_videos"]
    assert_close(
        turned, processor().views(clip, num_clips=1)["pixel_values_videos"].transpose(-1, -2), atol=0.1, rtol=0
    )
    middle = processor().views(clip, num_clips=1, num_crops=1)["pixel_values_videos"]
    assert_close(middle[0, 0], pixels(clip, size={"shortest_edge": 16})[0])


def test_multi_view_testing_is_one_call(tmp_path):
    model, clip = save_classifier(tmp_path), frames(30)
    views = processor(sampling="dense").views([clip, clip[::-1]], num_clips=2)["pixel_values_videos"]
    expected = torch.stack([model(video).logits.softmax(dim=-1).mean(dim=0) for video in views])
    assert_close(model.classify_views(views), expected)


@pytest.mark.parametrize(
    "settings, message",
    [({"num_crops": 2}, "num_crops: expected 1 or 3, got 2"), ({"num_clips": 0}, "num_clips"), ({"size": 3}, "size")],
)
def test_views_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        processor().views(frames(4), **settings)


# ------------------------------------------------------------------------------------------------ saving, pipeline


@pytest.fixture
def registered() -> None:
    """What the package's registration does for video."""
    AutoConfig.register(FlorenceVideoConfig.model_type, FlorenceVideoConfig, exist_ok=True)
    AutoModelForVideoClassification.register(FlorenceVideoConfig, FlorenceForVideoClassification, exist_ok=True)
    AutoVideoProcessor.register(FlorenceVideoConfig, FlorenceVideoProcessor, exist_ok=True)
    AutoImageProcessor.register(
        FlorenceVideoConfig, image_processor_classes={"torchvision": FlorenceImageProcessor}, exist_ok=True
    )


def save_classifier(folder: Path, **fields: Any) -> FlorenceForVideoClassification:
    config = FlorenceVideoConfig(
        embed_dim=8,
        depths=[1, 1],
        num_heads=[1, 2],
        window_size=3,
        num_frames=4,
        id2label={0: "waving", 1: "nodding", 2: "jumping"},
        **fields,
    )
    model = randomize(FlorenceForVideoClassification(config))
    model.save_pretrained(folder)
    processor(sampling="segment").save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        SMALL,
        {
            "size": {"height": 20, "width": 24},
            "do_center_crop": False,
            "image_mean": [0.1, 0.2, 0.3],
            "matte": [1, 2, 3],
        },
    ],
)
def test_it_prepares_frames_as_an_image_processor(settings):
    images = FlorenceImageProcessor(**settings)
    own = FlorenceVideoProcessor.from_image_processor(images, num_frames=3, sampling="segment")
    assert (own.num_frames, own.sampling, own.matte) == (3, "segment", images.matte)
    taken = frames(6)[[1, 3, 5]]
    expected = images(list(taken), return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    assert_close(own(frames(6), return_tensors="pt")["pixel_values_videos"][0], expected)


def test_it_is_saved_with_its_settings(tmp_path, registered):
    save_classifier(tmp_path)
    saved = json.loads((tmp_path / "video_preprocessor_config.json").read_text())
    assert (saved["sampling"], saved["num_frames"], saved["frame_stride"]) == ("segment", 4, 1)
    assert saved["video_processor_type"] == "FlorenceVideoProcessor"
    clip = frames(9)
    expected = pixels(clip, sampling="segment")
    for loaded in (AutoVideoProcessor.from_pretrained(tmp_path), FlorenceVideoProcessor.from_pretrained(tmp_path)):
        assert isinstance(loaded, FlorenceVideoProcessor)
        assert_close(loaded(clip, return_tensors="pt")["pixel_values_videos"], expected)
    verify_checkpoint(tmp_path)


@pytest.fixture
def films(tmp_path) -> list[Path]:
    """Three lossless video files: the frames of seeds 0 to 2."""
    require_av()
    return [write_video(tmp_path / f"{seed}.mp4", frames(count, seed=seed)) for seed, count in enumerate((9, 5, 2))]


FILMED = [frames(9), frames(5, seed=1), frames(2, seed=2)]


@pytest.mark.parametrize("sampling, stride", [("uniform", 1), ("segment", 1), ("dense", 3)])
def test_files_are_what_their_frames_are(films, sampling, stride):
    settings = {"sampling": sampling, "frame_stride": stride}
    expected = pixels(FILMED, **settings)
    assert_close(pixels(films, **settings), expected, atol=0, rtol=0)
    assert_close(pixels([str(file) for file in films], **settings), expected, atol=0, rtol=0)
    assert_close(pixels(films[1].read_bytes(), **settings), expected[1:2], atol=0, rtol=0)
    mixed = pixels(
        [films[0], FILMED[1].transpose(0, 3, 1, 2), films[2]], input_data_format="channels_first", **settings
    )
    assert_close(mixed, expected, atol=0, rtol=0)


def test_all_frames_of_a_file_and_frames_a_second(films):
    assert_close(pixels(films[0], do_sample_frames=False), pixels(FILMED[0], do_sample_frames=False))
    assert_close(pixels(films[0], fps=5), pixels(FILMED[0], num_frames=4))  # 9 frames at 10 a second
    metadata = processor()(films, return_metadata=True)["video_metadata"]
    assert [(about.total_num_frames, about.fps, about.height, about.width) for about in metadata] == [
        (count, 10.0, 30, 40) for count in (9, 5, 2)
    ]


def test_views_of_files(films):
    settings = {"num_clips": 2, "num_crops": 3, "sampling": "dense", "frame_stride": 2}
    expected = processor().views(FILMED, **settings)["pixel_values_videos"]
    assert_close(processor().views(films, **settings)["pixel_values_videos"], expected, atol=0, rtol=0)


def test_transformers_own_way_to_fetch_videos(films):
    """Chats call it; the rule of sampling is theirs then."""
    fetched, metadata = processor().fetch_videos([str(file) for file in films])
    for found, about, expected in zip(fetched, metadata, FILMED, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert about.video_backend == "pyav"
    found, _ = processor().fetch_videos(str(films[0]), sample_indices_fn=lambda metadata, **_: [1, 8])
    np.testing.assert_array_equal(found, FILMED[0][[1, 8]])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"max_pixels": 100}, "clip 0: '.*0.mp4': expected at most 100 pixels, got 40x30"),
        ({"max_aspect_ratio": 1}, "clip 0: '.*0.mp4': expected sides of a ratio of at most 1:1"),
        ({"decode_bytes": 1 << 10}, "clip 0: '.*0.mp4': "),
        ({"decode_seconds": 1e-6}, "clip 0: '.*0.mp4': decoding takes more than 1e-06 seconds"),
    ],
)
def test_limits_of_a_call_hold_for_files(films, settings, message):
    with pytest.raises(FlorenceVideoError, match=message):
        pixels(films, **settings)


def test_impossible_settings_of_decoding():
    with pytest.raises(ValueError, match="decode_backend: expected one of pyav, torchcodec, got 'opencv'"):
        processor(decode_backend="opencv")
    with pytest.raises(ValueError, match="decode_seconds: expected a positive, finite number, got -1"):
        processor(decode_seconds=-1)


@pytest.mark.parametrize("files", [False, True])
def test_the_pipeline_classifies(tmp_path, registered, films, files):
    model = save_classifier(tmp_path)
    clips = [str(file) for file in films] if files else FILMED
    probabilities = model(pixels(FILMED, sampling="segment")).logits.softmax(dim=-1)
    alone = pipeline("video-classification", model=str(tmp_path))
    FlorenceImageProcessor(**SMALL).save_pretrained(tmp_path)  # transformers batches only where it finds one
    classify = pipeline("video-classification", model=str(tmp_path))
    for results in (alone(clips), classify(clips), classify(clips, batch_size=3), [classify(clip) for clip in clips]):
        assert len(results) == 3
        for answers, row in zip(results, probabilities, strict=True):
            found = {answer["label"]: answer["score"] for answer in answers}
            expected = dict(zip(("waving", "nodding", "jumping"), row.tolist(), strict=True))
            assert found == pytest.approx(expected, abs=1e-5)
