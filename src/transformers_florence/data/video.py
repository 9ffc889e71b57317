"""Clips on disk, with classes or texts: folders, lists of public sets, filmstrips and shards, in one form."""

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from .files import metadata_rows, picture_inside
from .picture_corpus import load_split
from .sources import RowReader

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
KINETICS = ("label", "youtube_id", "time_start", "time_end")
MSRVTT = ("video_id", "sentence")
UCF_GROUP = re.compile(r"_g(\d+)_c\d+$")


@dataclass(frozen=True)
class Clip:
    """One row of a set.

    Attributes:
        source: the file of a video or of a filmstrip, or a video's bytes.
        name: what messages call it.
        label: its class; None where there is none.
        texts: what it is described by.
        film: what it was cut out of. Clips of one film are alike: they belong on one side of a split.
        strip: frames of a filmstrip, a picture with all frames one below the other; 0 for a video.
    """

    source: Path | bytes = field(repr=False)
    name: str
    label: str | None = None
    texts: tuple[str, ...] = ()
    film: str = ""
    strip: int = 0


def _rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a CSV file with a header, each with where it stands.

    Raises:
        ValueError: a column is missing, or a row lacks a value in one of them.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = sorted(set(columns) - set(reader.fieldnames or ()))
        if missing:
            raise ValueError(f"{file}: expected the columns {', '.join(columns)}, missing are {', '.join(missing)}")
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            for column in columns:
                if not row[column]:
                    raise ValueError(f"{where}: expected a {column}, got none")
            yield where, row


def _present(clips: Iterable[Clip], where: Path, missing: str) -> list[Clip]:
    """The clips whose files are there.

    Raises:
        ValueError: files are missing and `missing` is "raise"; no clip is left; or `missing` is neither.
    """
    if missing not in ("raise", "skip"):
        raise ValueError(f"missing: expected raise or skip, got {missing!r}")
    there: list[Clip] = []
    lost: list[str] = []
    for clip in clips:
        if isinstance(clip.source, Path) and clip.source.is_file():
            there.append(clip)
        else:
            lost.append(clip.name)
    if lost and missing == "raise":
        count = len(there) + len(lost)
        raise ValueError(f"{where}: expected {count} files, {len(lost)} of them are missing, the first is {lost[0]}")
    if not there:
        raise ValueError(f"{where}: expected at least one clip, got none")
    return there


def read_class_folders(root: str | Path) -> list[Clip]:
    """Videos in one folder for each class, whose name is the folder's.

    Raises:
        ValueError: there is none.
    """
    root = Path(root)
    files = [file for file in sorted(root.glob("*/*")) if file.suffix.lower() in SUFFIXES]
    clips = [Clip(file, f"{file.parent.name}/{file.name}", file.parent.name, film=str(file)) for file in files]
    return _present(clips, root, "raise")


def read_kinetics(file: str | Path, root: str | Path, *, missing: str = "raise") -> list[Clip]:
    """Kinetics' CSV (label, youtube_id, time_start, time_end): clips that were cut by the usual downloaders.

    A clip is `YOUTUBE-ID_SSSSSS_EEEEEE.mp4`, the seconds in six digits, in `root` or in its class's folder there.

    Args:
        missing: what a clip without a file does: "raise", or "skip" (many were taken off the net).

    Raises:
        ValueError: rows of another form, or files are missing; OSError: not readable.
    """
    file, root = Path(file), Path(root)

    def clips() -> Iterator[Clip]:
        for where, row in _rows(file, KINETICS):
            try:
                start, end = (int(float(row[name])) for name in ("time_start", "time_end"))
            except ValueError as error:
                raise ValueError(f"{where}: expected seconds, got {error}") from error
            name = f"{row['youtube_id']}_{start:06d}_{end:06d}.mp4"
            flat, nested = picture_inside(root, name, where), picture_inside(root, f"{row['label']}/{name}", where)
            yield Clip(nested if nested.is_file() else flat, name, row["label"], film=row["youtube_id"])

    return _present(clips(), file, missing)


def read_msrvtt(file: str | Path, root: str | Path, *, missing: str = "raise") -> list[Clip]:
    """MSR-VTT's 1K-A CSV (video_id, sentence and others): one sentence for each of 1,000 `VIDEO_ID.mp4`.

    Rows with one `video_id` are one clip with several texts. Arguments and errors are those of `read_kinetics`.
    """
    file, root = Path(file), Path(root)
    texts: dict[str, list[str]] = {}
    for _, row in _rows(file, MSRVTT):
        texts.setdefault(row["video_id"], []).append(row["sentence"])
    clips = (
        Clip(picture_inside(root, f"{name}.mp4", str(file)), name, texts=tuple(sentences), film=name)
        for name, sentences in texts.items()
    )
    return _present(clips, file, missing)


def read_ucf101(file: str | Path, root: str | Path, *, missing: str = "raise") -> list[Clip]:
    """UCF101's split files: a line is `Class/v_Class_g01_c01.avi`, behind it, in the training lists, a number.

    The group `g01` is the film. Arguments and errors are those of `read_kinetics`.
    """
    file, root = Path(file), Path(root)

    def clips() -> Iterator[Clip]:
        for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
            if not (parts := line.split()):
                continue
            label, slash, name = parts[0].partition("/")
            if not slash or len(parts) > 2:
                raise ValueError(f"{file}, line {number}: expected Class/video.avi and maybe a number, got {line!r}")
            group = UCF_GROUP.search(Path(name).stem)
            path = picture_inside(root, parts[0], f"{file}, line {number}")
            yield Clip(path, name, label, film=f"{label}, {group[1]}" if group else name)

    return _present(clips(), file, missing)


def read_filmstrips(path: str | Path, split: str | None = None) -> list[Clip]:
    """Filmstrips with a metadata.jsonl: rows of file_name, frames, and maybe label, text, video (the film), split.

    Raises:
        ValueError: rows of another form, or files are missing; OSError: not readable.
    """
    clips = []
    for where, file, row in metadata_rows(Path(path), split):
        frames, label, text, film = (row.get(name) for name in ("frames", "label", "text", "video"))
        if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
            raise ValueError(f"{where}: expected the number of frames, got {frames!r}")
        for name, value in (("label", label), ("text", text), ("video", film)):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{where}: expected {name} as a text, got {value!r}")
        texts = (text,) if text else ()
        clips.append(Clip(file, str(row["file_name"]), label, texts, film or str(file), frames))
    return _present(clips, Path(path), "raise")


class ShardedClips(Sequence[Clip]):
    """Videos in webdataset shards (tar files), through `datasets`: on disk, a row in memory when it is asked for.

    Args:
        folder: with the tar files, in which each sample is a video and a JSON, txt or cls file of one name.
        split: as `datasets` finds it.
        video: column of the videos, which is the ending of their names.
        label, text: columns of a class and of a text or a list of texts, empty for none; a dot leads into the parts of
            a column: `json.caption`.

    Raises:
        ValueError: no such folder, nothing in it that `datasets` reads, no such split or column; for a row, when it is
            read, a value that is no text.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", *, video: str = "mp4", label: str = "", text: str = ""
    ) -> None:
        rows = load_split(folder, split)
        wanted = [video, *(column.split(".")[0] for column in (label, text) if column)]
        unknown = sorted(set(wanted) - set(rows.column_names))
        if unknown:
            raise ValueError(f"{folder}: expected the columns {', '.join(unknown)}, got {rows.column_names}")
        self.rows = rows.cast_column(video, datasets.Video(decode=False))
        self.video = video
        self.label_reader = RowReader(video, label, None, is_label=True) if label else None
        self.text_reader = RowReader(video, text, None, is_label=False) if text else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: Any) -> Any:
        row = self.rows[int(number)]
        labels = [] if self.label_reader is None else self.label_reader.texts(row)
        texts = [] if self.text_reader is None else self.text_reader.texts(row)
        name = row["__key__"]
        return Clip(row[self.video]["bytes"], name, labels[0] if labels else None, tuple(texts), film=name)


FORMATS = ("folders", "kinetics", "msrvtt", "ucf101", "filmstrips", "shards")


def read_clips(
    kind: str, data: str | Path, *, root: str | Path = "", split: str = "", label: str = "", text: str = ""
) -> Sequence[Clip]:
    """The clips of a set, by one of the readers above.

    Args:
        kind: one of `FORMATS`.
        data: the folder, or the list (kinetics, msrvtt, ucf101).
        root: where the videos of a list are; its own folder if empty. Videos that are missing are left out.
        split: of filmstrips and shards; all, and "train", if empty.
        label, text: columns of shards.

    Raises:
        ValueError: another kind, or what the reader refuses.
    """
    data, lists = Path(data), {"kinetics": read_kinetics, "msrvtt": read_msrvtt, "ucf101": read_ucf101}
    if kind in lists:
        return lists[kind](data, root or data.parent, missing="skip")
    if kind == "folders":
        return read_class_folders(data)
    if kind == "filmstrips":
        return read_filmstrips(data, split or None)
    if kind == "shards":
        return ShardedClips(data, split or "train", label=label, text=text)
    raise ValueError(f"expected a format of clips, one of {', '.join(FORMATS)}, got {kind!r}")


def split_by_film(clips: Sequence[Clip], share: float, seed: int = 0) -> tuple[list[Clip], list[Clip]]:
    """Training and held-out clips, no film on both sides: films in a random order go out until `share` is reached.

    Raises:
        ValueError: a share that is not between 0 and 1, or too few films for two sides.
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    films: dict[str, list[Clip]] = {}
    for clip in clips:
        films.setdefault(clip.film, []).append(clip)
    order = np.random.default_rng(seed).permutation(sorted(films))
    held_out: list[Clip] = []
    for film in order[:-1]:
        if len(held_out) >= share * len(clips):
            break
        held_out += films[film]
    if not held_out:
        raise ValueError(f"expected clips of at least two films, got {len(films)}")
    out = {clip.film for clip in held_out}
    return [clip for clip in clips if clip.film not in out], held_out


def class_names(clips: Iterable[Clip]) -> list[str]:
    """The classes of clips, sorted.

    Raises:
        ValueError: a clip without one.
    """
    names = set()
    for clip in clips:
        if clip.label is None:
            raise ValueError(f"{clip.name}: expected a class, got none")
        names.add(clip.label)
    return sorted(names)


__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Clip",
    "ShardedClips",
    "class_names",
    "read_class_folders",
    "read_clips",
    "read_filmstrips",
    "read_kinetics",
    "read_msrvtt",
    "read_ucf101",
    "split_by_film",
]
