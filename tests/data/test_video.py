"""Readers of clips, on lists written by hand, and their frames, against the ones that were written."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.transforms import v2

from tests.tiny_videos import frames, require_av, write_video
from transformers_florence.data.video import (
    Clip,
    ShardedClips,
    class_names,
    read_class_folders,
    read_filmstrips,
    read_kinetics,
    read_msrvtt,
    read_ucf101,
    split_by_film,
)
from transformers_florence.data.video_transforms import (
    augment_clip,
    collate_clips,
    make_views,
    mix_clips,
    open_clip,
    read_frames,
    training_transforms,
)
from transformers_florence.video_decoding import FlorenceVideoError
from transformers_florence.video_processing_florence import FlorenceVideoProcessor, sample_frame_indices

SHARED = Path(__file__).parents[3] / "shared" / "data" / "fir_action"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"film")


def described(clips: list[Clip]) -> list[tuple[Any, ...]]:
    return [(clip.source.name, clip.label, clip.texts, clip.film) for clip in clips]


def processor(**settings: Any) -> FlorenceVideoProcessor:
    fields = {"num_frames": 4, "size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}}
    return FlorenceVideoProcessor(**{**fields, **settings})


def write_strip(folder: Path, pixels: np.ndarray, **row: Any) -> Clip:
    Image.fromarray(pixels.reshape(-1, *pixels.shape[2:])).save(folder / "strip.png")
    rows = {"file_name": "strip.png", "frames": len(pixels), **row}
    (folder / "metadata.jsonl").write_text(json.dumps(rows) + "\n")
    return read_filmstrips(folder)[0]


# --------------------------------------------------------------------------------------------------------- readers


def test_folders_of_classes(tmp_path):
    touch(tmp_path, "wave/b.mp4", "wave/a.MKV", "nod/c.webm", "nod/notes.txt", "d.mp4")
    clips = read_class_folders(tmp_path)
    assert [(clip.name, clip.label) for clip in clips] == [
        ("nod/c.webm", "nod"),
        ("wave/a.MKV", "wave"),
        ("wave/b.mp4", "wave"),
    ]
    assert class_names(clips) == ["nod", "wave"] and len({clip.film for clip in clips}) == 3
    with pytest.raises(ValueError, match="expected at least one clip, got none"):
        read_class_folders(tmp_path / "wave")


def test_kinetics(tmp_path):
    touch(tmp_path, "abc_000005_000015.mp4", "juggling, balls/-x_y_000100_000110.mp4")
    file = tmp_path / "val.csv"
    file.write_text(
        'label,youtube_id,time_start,time_end,split\nabseiling,abc,5,15,val\n"juggling, balls",-x_y,100.0,110,val\n'
    )
    assert described(read_kinetics(file, tmp_path)) == [
        ("abc_000005_000015.mp4", "abseiling", (), "abc"),
        ("-x_y_000100_000110.mp4", "juggling, balls", (), "-x_y"),
    ]
    file.write_text(file.read_text() + "abseiling,gone,0,10,val\n")
    with pytest.raises(
        ValueError, match=r"expected 3 files, 1 of them are missing, the first is .*gone_000000_000010.mp4"
    ):
        read_kinetics(file, tmp_path)
    assert len(read_kinetics(file, tmp_path, missing="skip")) == 2
    with pytest.raises(ValueError, match="missing: expected raise or skip, got 'ignore'"):
        read_kinetics(file, tmp_path, missing="ignore")
    (tmp_path / "none.csv").write_text("label,youtube_id,time_start,time_end\nx,y,0,1\n")
    with pytest.raises(ValueError, match="expected at least one clip, got none"):
        read_kinetics(tmp_path / "none.csv", tmp_path, missing="skip")


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "label,youtube_id\nx,y\n",
            "expected the columns label, youtube_id, time_start, time_end, missing are time_end",
        ),
        ("label,youtube_id,time_start,time_end\nx,y,0\n", "line 2: expected a time_end, got none"),
        ("label,youtube_id,time_start,time_end\nx,y,zero,1\n", "line 2: expected seconds, got could not convert"),
        ("label,youtube_id,time_start,time_end\nx,../../y,0,1\n", "line 2: expected a picture inside of"),
        ("", "missing are label"),
    ],
)
def test_kinetics_lists_of_another_form(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_kinetics(tmp_path / "list.csv", tmp_path)


def test_msrvtt(tmp_path):
    touch(tmp_path, "video7020.mp4", "video9770.mp4")
    file = tmp_path / "1k.csv"
    file.write_text(
        "key,vid_key,video_id,sentence\nret0,msr9770,video9770,a person is connecting something\n"
        'ret1,msr7020,video7020,"a little girl, a cat"\nret2,msr7020,video7020,a girl plays\n'
    )
    assert described(read_msrvtt(file, tmp_path)) == [
        ("video9770.mp4", None, ("a person is connecting something",), "video9770"),
        ("video7020.mp4", None, ("a little girl, a cat", "a girl plays"), "video7020"),
    ]
    with pytest.raises(ValueError, match="expected a class, got none"):
        class_names(read_msrvtt(file, tmp_path))


def test_ucf101(tmp_path):
    names = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "YoYo/v_YoYo_g25_c05.avi", "YoYo/other.avi"]
    touch(tmp_path, *names)
    (tmp_path / "trainlist01.txt").write_text(f"{names[0]} 1\n{names[1]} 101\n\n{names[2]}\n")
    assert described(read_ucf101(tmp_path / "trainlist01.txt", tmp_path)) == [
        ("v_ApplyEyeMakeup_g08_c01.avi", "ApplyEyeMakeup", (), "ApplyEyeMakeup, 08"),
        ("v_YoYo_g25_c05.avi", "YoYo", (), "YoYo, 25"),
        ("other.avi", "YoYo", (), "other.avi"),
    ]
    (tmp_path / "bad.txt").write_text("v_YoYo_g25_c05.avi 1\n")
    with pytest.raises(ValueError, match="bad.txt, line 1: expected Class/video.avi and maybe a number, got 'v_YoYo"):
        read_ucf101(tmp_path / "bad.txt", tmp_path)


def test_filmstrips(tmp_path):
    pixels = frames(5)
    clip = write_strip(tmp_path, pixels, label="walk", text="a person walking", video="film 1")
    assert described([clip]) == [("strip.png", "walk", ("a person walking",), "film 1")]
    np.testing.assert_array_equal(open_clip(clip, processor()), pixels)
    wrong = Clip(clip.source, "strip.png", strip=4)
    with pytest.raises(ValueError, match="strip.png: expected 4 frames of one height, got 150 rows"):
        open_clip(wrong, processor())
    for row, message in (
        ({"frames": 0}, "line 1: expected the number of frames, got 0"),
        ({"frames": True}, "line 1: expected the number of frames, got True"),
        ({"label": 3}, "line 1: expected label as a text, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            write_strip(tmp_path, pixels, **row)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs shared/data/fir_action beside the clone")
def test_real_filmstrips():
    clips = read_filmstrips(SHARED, "train")
    assert len(clips) == 226 and len(class_names(clips)) == 9
    assert open_clip(clips[0], processor()).shape == (12, 120, 160, 3)
    train, held_out = split_by_film(clips, 0.25)
    assert not {clip.film for clip in train} & {clip.film for clip in held_out}
    assert len(train) + len(held_out) == 226 and 0.25 <= len(held_out) / 226 < 0.4


def write_tar(file: Path, samples: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in samples.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards(tmp_path):
    """What `datasets` reads of a webdataset of videos, without decoding a single one."""
    (tmp_path / "data").mkdir()
    rows = [{"caption": ["a girl", " plays "], "label": "play"}, {"caption": ["a cat"], "label": "sit"}]
    for shard in range(2):
        samples = {}
        for number, row in enumerate(rows):
            samples[f"{shard}{number}.mp4"] = f"film {shard}{number}".encode()
            samples[f"{shard}{number}.json"] = json.dumps(row).encode()
        write_tar(tmp_path / "data" / f"train-{shard}.tar", samples)
    clips = ShardedClips(tmp_path, text="json.caption", label="json.label")
    assert len(clips) == 4 and class_names(clips) == ["play", "sit"]
    assert [clip.source for clip in clips] == [b"film 00", b"film 01", b"film 10", b"film 11"]
    assert (clips[2].name, clips[2].texts, clips[2].label) == ("10", ("a girl", "plays"), "play")
    assert ShardedClips(tmp_path)[0].texts == ()
    with pytest.raises(ValueError, match="expected the columns webm, got"):
        ShardedClips(tmp_path, video="webm")
    with pytest.raises(ValueError, match="expected a corpus with the split 'test'|expected the folder"):
        ShardedClips(tmp_path, "test")


def test_no_film_is_on_both_sides():
    clips = [Clip(Path("x"), f"{film}{part}", film=film) for film in "abcdefgh" for part in range(3)]
    sides = set()
    for seed in range(5):
        train, held_out = split_by_film(clips, 0.3, seed)
        assert len(held_out) == 9 and sorted(train + held_out, key=lambda clip: clip.name) == clips
        assert not {clip.film for clip in train} & {clip.film for clip in held_out}
        sides.add("".join(sorted({clip.film for clip in held_out})))
    assert len(sides) > 1
    with pytest.raises(ValueError, match="at least two films, got 1"):
        split_by_film(clips[:3], 0.5)
    with pytest.raises(ValueError, match="share: expected a number between 0 and 1, got 1"):
        split_by_film(clips, 1)


# ---------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("sampling", ["uniform", "segment", "dense"])
def test_frames_of_files_and_strips_are_the_written_ones(tmp_path, sampling):
    require_av()
    own = processor(sampling=sampling, frame_stride=2)
    file = write_video(tmp_path / "film.mp4", frames(9))
    strip = write_strip(tmp_path, frames(9))
    for seed in (None, 3):
        generators = [None if seed is None else np.random.default_rng(seed) for _ in range(4)]
        expected = frames(9)[sample_frame_indices(9, 4, sampling, 2, 1, generators[0])[0]].transpose(0, 3, 1, 2)
        for clip, generator in zip(
            (Clip(file, "f"), Clip(file.read_bytes(), "b"), strip), generators[1:], strict=True
        ):
            np.testing.assert_array_equal(read_frames(clip, own, generator).numpy(), expected)
    with pytest.raises(FlorenceVideoError):
        read_frames(Clip(b"no film", "x"), own)


def test_views_are_the_processors(tmp_path):
    require_av()
    file, own = write_video(tmp_path / "film.mp4", frames(9)), processor()
    strip = write_strip(tmp_path, frames(9))
    for counts in ((1, 1), (2, 3)):
        expected = own.views(frames(9), *counts)["pixel_values_videos"]
        found = make_views([Clip(file, "film"), strip], own, *counts)
        assert found.shape == (2, counts[0] * counts[1], 4, 3, 16, 16)
        assert_close(found, torch.cat([expected, expected]), atol=0, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"rand_augment": 2, "magnitude": 9}, {"flip": False, "scale": (0.2, 0.3)}])
def test_every_frame_of_a_clip_is_augmented_alike(settings):
    """A clip of one picture stays one, whatever happens to it; other clips get other things."""
    transforms, seen = training_transforms(16, **settings), set()
    picture = torch.from_numpy(frames(1)).permute(0, 3, 1, 2)
    for seed in range(12):
        torch.manual_seed(seed)
        clip = augment_clip(transforms, picture.expand(5, -1, -1, -1))
        assert clip.shape == (5, 3, 16, 16) and clip.dtype == torch.uint8 and type(clip) is torch.Tensor
        assert_close(clip, clip[:1].expand(5, -1, -1, -1))
        torch.manual_seed(seed)
        assert_close(augment_clip(transforms, picture)[0], clip[0])
        seen.add(clip.sum().item())
    assert len(seen) > 3


def test_augmentation_that_cannot_be():
    with pytest.raises(ValueError, match=r"scale: expected 0 < from <= to <= 1, got \(0.5, 0.2\)"):
        training_transforms(16, scale=(0.5, 0.2))
    with pytest.raises(ValueError, match="magnitude: expected 0 to 30, got 31"):
        training_transforms(16, magnitude=31)


def test_a_batch_is_normalised_as_the_processor_does():
    own = processor(do_resize=False, do_center_crop=False)
    clips = [torch.from_numpy(frames(4, seed=seed)).permute(0, 3, 1, 2) for seed in range(2)]
    expected = own([frames(4), frames(4, seed=1)], return_tensors="pt")["pixel_values_videos"]
    assert_close(collate_clips(clips, own), expected, atol=1e-5, rtol=1e-5)


def test_mixup_is_a_share_of_each_clip_and_of_its_label():
    pixels, labels = torch.randn(4, 2, 3, 5, 5), torch.tensor([0, 1, 2, 2])
    torch.manual_seed(1)
    mixed, soft = mix_clips(pixels, labels, 3, alpha=0.8)
    share = soft[0, 0].item()  # of the clip itself; the rest is the one before it in the batch
    assert 0 < share < 1
    assert_close(mixed, share * pixels + (1 - share) * pixels.roll(1, 0))
    hard = torch.nn.functional.one_hot(labels, 3).float()
    assert_close(soft, share * hard + (1 - share) * hard.roll(1, 0))
    torch.manual_seed(1)
    assert_close(mix_clips(pixels, labels, 3, alpha=0.8)[0], mixed)


def test_randaugment_is_torchvisions_own():
    torch.manual_seed(0)
    expected = v2.RandAugment(2, 9)(torch.from_numpy(frames(1)).permute(0, 3, 1, 2))
    transforms = v2.Compose(training_transforms(16, rand_augment=2, magnitude=9).transforms[2:])
    torch.manual_seed(0)
    assert_close(augment_clip(transforms, torch.from_numpy(frames(1)).permute(0, 3, 1, 2)), expected)
