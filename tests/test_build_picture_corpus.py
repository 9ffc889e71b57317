"""The corpus builder on tiny packages made here: what it reads, draws, splits, keeps, leaves out and says."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

pytest.importorskip("resvg_py", reason="needs the renderer: pip install resvg-py")

import build_picture_corpus as corpus
import picture_sources as sources
from tests.tiny_packages import (
    clipart_of,
    emoji_of,
    icon_of,
    png_of,
    svg_of,
    write_deb,
    write_emoji_texts,
    write_iconify,
    write_npm,
)

NUM_CONCEPTS = 14  # of which 3 and 10 are test concepts
CODES = [f"{0x1F600 + index:X}" for index in range(NUM_CONCEPTS)]
SENTENCE = "A blue block."


def color_of(style_index: int, concept: int) -> str:
    return f"#{10 + 40 * style_index:02x}{10 + 15 * concept:02x}80"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with all packages of six styles, of clip art and of stamps; no client is installed."""
    folder = tmp_path / "cache"
    folder.mkdir()
    kept = {"noto", "noto-v1", "twemoji", "openmoji", "fluent-flat", "fluent-3d"}
    for style in sources.EMOJI_STYLES.keys() - kept:
        monkeypatch.delitem(sources.EMOJI_STYLES, style)
    monkeypatch.setattr(shutil, "which", lambda client: None)

    emoji = []
    for index, code in enumerate(CODES):
        dark = {"label": f"face {index}: dark", "hexcode": f"{code}-1F3FF", "tone": 5}
        emoji.append(emoji_of(code, f"face {index}", index, tags=["tag", f"tag {index}"], skins=[dark]))
    tone = {"label": "dark skin tone", "hexcode": "1F3FF", "emoji": "\U0001f3ff", "order": -1, "group": 1}
    letter = {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "\U0001f1e6"}
    write_emoji_texts(folder, [letter, tone, *reversed(emoji)])

    chars = {code.lower(): f"icon-{index}" for index, code in enumerate(CODES)} | {f"{CODES[0]}-1f3ff".lower(): "dark"}
    for style_index, style in enumerate(("noto", "twemoji")):
        icons = {f"icon-{index}": icon_of(color_of(style_index, index)) for index in range(NUM_CONCEPTS)}
        write_iconify(folder, style, {**icons, "dark": icon_of("#000"), "not-an-emoji": icon_of("#f00")}, chars)
    # No code points here: found by CLDR's name, by the name in another set, by an alias, by the Unicode name.
    icons = {"face-0": icon_of(color_of(2, 0)), "icon-1": icon_of(color_of(2, 1)), "old": icon_of(color_of(2, 2))}
    icons |= {sources.slug("SMILING FACE WITH OPEN MOUTH"): icon_of(color_of(2, 3)), "grinning": icon_of("#f00")}
    icons |= {sources.slug("GRINNING FACE WITH SMILING EYES"): icon_of("#f00", hidden=True)}  # withdrawn for icon-1
    icons |= {"left-half": icon_of(color_of(2, 4), left=0)}
    aliases = {"face-2": {"parent": "old"}, "face-4": {"parent": "left-half", "hFlip": True}}
    write_iconify(folder, "noto-v1", icons, {}, aliases=aliases)
    # Icons 4 and 5 look the same, and 6 looks like twemoji's test concept 3.
    icons = {f"icon-{index}": icon_of(color_of(3, index)) for index in range(NUM_CONCEPTS)}
    icons |= {"icon-5": icons["icon-4"], "icon-6": icon_of(color_of(1, 3))}
    write_iconify(folder, "fluent-flat", icons, chars)
    openmoji = {f"color/svg/{code}-FE0F.svg": svg_of(color_of(4, i)).encode() for i, code in enumerate(CODES)}
    write_npm(folder, "openmoji@17.0.0", {**openmoji, "color/svg/1F3FF.svg": svg_of("red").encode()})
    webp = {f"assets/{code.lower()}.webp": png_of(color_of(5, i), "WEBP", 200) for i, code in enumerate(CODES)}
    write_npm(folder, sources.EMOJI_STYLES["fluent-3d"].package, webp)

    apples = range(40)
    drawings = {f"food/fruit/apple_{index}.svg": clipart_of(f"Apple {index}", f"#00{index:02x}00") for index in apples}
    drawings |= {
        "food/twin.svg": clipart_of("Twin", "#000100"),  # the drawing of Apple 1
        "food/not_free.svg": clipart_of("Not free", "#111111", "http://creativecommons.org/licenses/GPL/2.0/"),
        "food/blank.svg": clipart_of("Blank", "white"),
        "food/broken.svg": "<svg",
        "tools/Red_hammer_01.svg": clipart_of("Part of the tool collection", "#990000"),
        "computer/icons/theme.svg": clipart_of("Left out", "#123456"),
        "tools/train.svg": clipart_of("Steam_Engine", "#654321"),
    }
    drawings |= {f"cards/queen_{index}.svg": clipart_of("Card", f"#aa{index:02x}00") for index in range(9)}
    drawings = {f"usr/share/openclipart/svg/{path}": data for path, data in drawings.items()}
    write_deb(folder, sources.CLIPART_PACKAGE, drawings)
    disc = svg_of("none", more='<circle cx="4" cy="4" r="2" fill="cyan"/>')
    stamps = {"a/b/block.png": png_of("blue"), "a/b/block.txt": f"{SENTENCE}\nfr.utf8=Un bloc."}
    stamps |= {"a/mute.png": png_of("red"), "c/disc.svg": disc, "c/disc.txt": "A disc."}
    stamps = {f"usr/share/tuxpaint/stamps/{path}": data for path, data in stamps.items()}
    write_deb(folder, sources.STAMPS_PACKAGE, stamps)
    return folder


def build(cache: Path, out: Path, *options: str) -> int:
    return corpus.main(["--out", str(out), "--cache", str(cache), "--size", "16", "--jobs", "1", *options])


def load(folder: Path, tmp_path: Path):
    """All splits as `datasets` finds them by itself."""
    return load_dataset(str(folder), cache_dir=str(tmp_path / "datasets"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(splits) -> list[dict]:
    return [row for split in splits.values() for row in split]


def test_parquet_rows_splits_and_licences(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(cache, tmp_path / "out") == 0
    splits = load(tmp_path / "out", tmp_path)
    assert set(splits) == set(corpus.SPLITS)
    rows = rows_of(splits)
    assert all(row["split"] == name for name, split in splits.items() for row in split)
    assert len({(row["style"], row["file_name"]) for row in rows}) == len(rows)
    assert all(row["image"].size == (16, 16) and row["image"].mode == "RGB" for row in rows)

    emoji = [row for row in rows if row["source"] == "emoji"]
    assert {row["concept"] for row in emoji} == set(range(NUM_CONCEPTS))
    for row in emoji:
        assert (row["name"], row["hexcode"]) == (f"face {row['concept']}", CODES[row["concept"]])
        assert row["keywords"] == ["cldr", "tag", f"tag {row['concept']}"]
        assert (row["group"], row["subgroup"]) == ("smileys", ("even", "odd")[row["concept"] % 2])
        held_out_style = row["style"] in ("noto", "noto-v1")
        expected = "test_concept" if row["concept"] in (3, 10) else "test_style" if held_out_style else "train"
        assert row["split"] == expected
    found = {style: {row["concept"] for row in emoji if row["style"] == style} for style in sources.EMOJI_STYLES}
    everything = set(range(NUM_CONCEPTS))
    # 5 is drawn as 4, and 6 as a test concept of twemoji
    assert found.pop("fluent-flat") == everything - {5, 6}
    assert found.pop("noto-v1") == {0, 1, 2, 3, 4}
    assert all(concepts == everything for concepts in found.values())

    clipart = {row["name"]: row for row in rows if row["source"] == "clipart"}
    names = {f"Apple {index}" for index in range(40)} | {"Red hammer", "Steam Engine"} | {"queen"}
    assert {"Twin", "Apple 1"} & set(clipart)
    assert set(clipart) - {"Twin", "Apple 1"} == names - {"Apple 1"}
    assert clipart["Apple 7"]["keywords"] == ["big thing"]
    assert clipart["Apple 7"]["description"] == "drawn here"
    assert (clipart["Apple 7"]["group"], clipart["Apple 7"]["subgroup"]) == ("food", "food/fruit")
    for name, row in clipart.items():
        held_out = int(hashlib.sha256(name.lower().encode()).hexdigest(), 16) % 8 == 0
        assert row["split"] == ("test_clipart" if held_out else "train")
        assert (row["concept"], row["hexcode"]) == (-1, "")

    stamps = {row["name"]: row for row in rows if row["source"] == "stamps"}
    assert set(stamps) == {SENTENCE, "A disc."}
    licenses = {row["style"]: row["license"] for row in rows}
    expected = {style: source.license for style, source in sources.EMOJI_STYLES.items()}
    assert licenses == expected | {"openclipart": "CC-PDDC", "tuxpaint": "GPL-2.0-or-later"}

    said = capsys.readouterr()
    assert "clipart: 3 of 55 pictures cannot be used" in said.err
    assert "train: 2 pictures that come twice are left out" in said.err
    assert "train: 1 pictures that equal a test picture are left out" in said.err
    assert f"| {len(rows)} |" in said.out.splitlines()[-1]


def test_each_row_has_its_own_picture(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "out", "--size", "32") == 0
    rows = {row["name"] + row["style"]: row["image"] for row in rows_of(load(tmp_path / "out", tmp_path))}
    assert rows["face 8twemoji"].getpixel((16, 16)) == (50, 130, 128)
    assert rows["face 1noto-v1"].getpixel((16, 16)) == (90, 25, 128)
    flipped = [rows["face 4noto-v1"].getpixel((x, 16)) for x in (4, 28)]  # its icon lies on the left
    assert flipped == [(255, 255, 255), (90, 70, 128)]
    assert rows["Apple 7openclipart"].getpixel((1, 1)) == (0, 7, 0)
    assert rows["A disc.tuxpaint"].getpixel((16, 16)) == (0, 255, 255)
    red, green, blue = rows[SENTENCE + "tuxpaint"].getpixel((31, 31))
    assert max(red, green) < 5 and blue > 250


def test_imagefolder_holds_what_parquet_holds(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "parquet") == 0
    assert build(cache, tmp_path / "folder", "--format", "imagefolder") == 0
    parquet, folder = (load(tmp_path / name, tmp_path) for name in ("parquet", "folder"))
    for split in corpus.SPLITS:
        assert len(parquet[split]) == len(folder[split]) > 0
        expected = {row["file_name"]: row for row in parquet[split]}
        metadata = tmp_path / "folder" / "data" / split / "metadata.jsonl"
        for line in metadata.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            picture = Image.open(metadata.parent / row["file_name"])
            same = expected.pop(row["file_name"])
            assert picture.tobytes() == same.pop("image").tobytes()
            assert row == same
        assert not expected
    # One split alone: no picture is taken for a split because of its name.
    train = load_dataset("imagefolder", data_dir=str(tmp_path / "folder/data/train"), cache_dir=str(tmp_path / "one"))
    assert len(train["train"]) == len(parquet["train"])


def test_permissive_leaves_share_alike_and_gpl_out(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "out", "--format", "imagefolder") == 0
    assert list((tmp_path / "out").rglob("tuxpaint"))
    assert build(cache, tmp_path / "out", "--permissive") == 0  # nothing of the first corpus stays behind
    assert not list((tmp_path / "out").rglob("tuxpaint"))
    rows = rows_of(load(tmp_path / "out", tmp_path))
    assert {row["license"] for row in rows} == {"Apache-2.0", "CC-BY-4.0", "MIT", "CC-PDDC"}
    assert {row["style"] for row in rows} == set(sources.EMOJI_STYLES) - {"openmoji"} | {"openclipart"}


def test_same_packages_give_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    other_cache = tmp_path / "other"
    shutil.copytree(cache, other_cache)
    for file_format in ("parquet", "imagefolder"):
        assert build(cache, tmp_path / "a", "--format", file_format) == 0
        assert build(other_cache, tmp_path / "b", "--format", file_format, "--jobs", "2") == 0
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        shutil.rmtree(other_cache / "rendered")


def test_a_second_run_goes_on_where_the_first_was(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = corpus.render_picture

    def interrupt_in_clipart(task):
        if task[0]["source"] == "clipart":
            raise KeyboardInterrupt
        rendered.append(task[0]["style"])
        return render(task)

    monkeypatch.setattr(corpus, "render_picture", interrupt_in_clipart)
    with pytest.raises(KeyboardInterrupt):
        build(cache, tmp_path / "out")
    assert set(rendered) == set(sources.EMOJI_STYLES)
    assert not (tmp_path / "out" / "data").exists()

    rendered.clear()
    monkeypatch.setattr(corpus, "render_picture", lambda task: rendered.append(task[0]["style"]) or render(task))
    assert build(cache, tmp_path / "out") == 0
    assert set(rendered) == {"openclipart", "tuxpaint"}
    first = files_of(tmp_path / "out")

    rendered.clear()
    assert build(cache, tmp_path / "out") == 0
    assert rendered == []
    assert files_of(tmp_path / "out") == first

    assert build(cache, tmp_path / "large", "--sources", "stamps", "--size", "24") == 0
    assert rendered == ["tuxpaint", "tuxpaint"]  # another size is another picture


def test_what_cannot_be_had_is_one_line_and_the_rest_is_built(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    next(cache.glob("*twemoji*")).write_bytes(b"no package")
    next(cache.glob("openmoji*")).unlink()
    next(cache.glob("openclipart*")).unlink()
    next(cache.glob("tuxpaint*")).write_bytes(b"no package either")
    assert build(cache, tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out:" in line]
    left_out = [line.split(" is left out: ")[0] for line in lines]
    assert left_out == ["emoji/twemoji", "emoji/openmoji", "clipart", "stamps"]
    assert "cannot be read" in lines[0] and "cannot be read" in lines[3]
    assert "the client npm is not installed" in lines[1]
    assert "the client apt-get is not installed" in lines[2]
    styles = {row["style"] for row in rows_of(load(tmp_path / "out", tmp_path))}
    assert styles == {"noto", "noto-v1", "fluent-flat", "fluent-3d"}


def test_nothing_to_build_from_is_exit_code_1(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(tmp_path / "empty", tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line.split(":")[0] for line in lines] == [
        "emoji are left out",
        "clipart is left out",
        "stamps is left out",
        "nothing is built",
    ]
    assert not (tmp_path / "out" / "data").exists()


def test_missing_renderer_is_one_line(cache, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(corpus, "resvg_py", None)
    assert build(cache, tmp_path / "out") == 1
    assert capsys.readouterr().err == "nothing is built: the renderer is not installed (pip install resvg-py)\n"


def test_equal_titles_fall_on_one_side() -> None:
    row = {"source": "clipart", "style": "openclipart", "concept": -1}
    titles = [f"A drawing of thing {index}" for index in range(400)]
    sides = [corpus.split_of({**row, "name": title}) for title in titles]
    assert sides == [corpus.split_of({**row, "name": title.upper().replace(" ", " \t")}) for title in titles]
    assert 30 < sides.count("test_clipart") < 70


def test_clipart_called_like_an_unseen_concept_is_left_out_of_train(capsys: pytest.CaptureFixture) -> None:
    concepts = {2: "old thing", 3: "blue thing", 10: "thing in a box", 17: "red thing"}  # the last three are unseen
    emoji = [{"source": "emoji", "style": "twemoji", "concept": index, "name": concepts[index]} for index in concepts]
    titles = ["BLUE  thing", "Blue\tThing ", "blue thing", "Thing in  a BOX", "blue things", "Old Thing", "Red thing"]
    clipart = [{"source": "clipart", "style": "openclipart", "concept": -1, "name": title} for title in titles]
    rows = [{**row, "pixels": str(index)} for index, row in enumerate([*emoji, *clipart])]  # no two look the same
    splits = corpus.assign_splits(rows)
    assert [row["name"] for row in splits["train"]] == ["old thing", "blue things", "Old Thing"]
    assert [row["name"] for row in splits["test_clipart"]] == ["Red thing"]  # by its hash; no picture to learn from
    said = capsys.readouterr().err.splitlines()
    assert "train: 4 pictures with the name of an unseen concept are left out" in said
    assert "train: 0 pictures that come twice are left out" in said


def test_a_folder_with_other_data_is_not_touched(cache, tmp_path, capsys) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "thesis.txt").write_text("three years")
    with pytest.raises(SystemExit) as stop:
        build(cache, tmp_path / "out")
    assert stop.value.code == 2
    assert "got a folder with other data" in capsys.readouterr().err
    assert (tmp_path / "out" / "data" / "thesis.txt").read_text() == "three years"


def test_the_script_runs_by_its_path(cache: Path, tmp_path: Path) -> None:
    """With two processes, which must find the function that renders."""
    options = ["--cache", cache, "--size", "16", "--jobs", "2"]
    command = [sys.executable, "examples/build_picture_corpus.py", "--sources", "stamps", *options]
    subprocess.run([*command, "--out", tmp_path / "script"], cwd=Path(corpus.__file__).parent.parent, check=True)
    shutil.rmtree(cache / "rendered")
    assert build(cache, tmp_path / "here", "--sources", "stamps") == 0
    assert files_of(tmp_path / "script") == files_of(tmp_path / "here")


@pytest.mark.parametrize("options", [("--size", "8"), ("--size", "5000"), ("--jobs", "0"), ("--sources", "photos")])
def test_impossible_options_are_refused(options: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        corpus.main(["--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
