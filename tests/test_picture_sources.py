"""What the packages hold: how icons' names lead to concepts. Clip art and stamps: see test_build_picture_corpus.py."""

import shutil
from pathlib import Path

import pytest

import picture_sources as sources
from tests.tiny_packages import emoji_of, write_emoji_texts


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> sources.EmojiTexts:
    """Five concepts; no client is installed, so that no icon set adds its names."""
    monkeypatch.setattr(shutil, "which", lambda client: None)
    labels = {"1F40B": "whale", "1F3B1": "ball", "1F52E": "ball 2", "1F3C1": "flag: Chad", "1F51F": "keycap 10"}
    emoji = [emoji_of(code, label, order) for order, (code, label) in enumerate(labels.items())]
    write_emoji_texts(tmp_path, emoji)
    return sources.EmojiTexts(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keycap: #", "keycap-hash"),
        ("keycap: *", "keycap-asterisk"),
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("Mrs. Claus", "mrs-claus"),
        ("flag: Trinidad & Tobago", "flag-trinidad-and-tobago"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert sources.slug(name) == expected


@pytest.mark.parametrize(
    ("icon", "code"),
    [
        ("whale", "1F40B"),
        ("whale-2", "1F40B"),
        ("whale-9", "1F40B"),
        ("whale-12", None),  # a number of two digits counts something else
        ("whale-x", None),
        ("shark-2", None),
        ("ball", "1F3B1"),
        ("ball-2", "1F52E"),  # the name of a concept goes before the second drawing of another
        ("ball-3", "1F3B1"),
        ("keycap-10", "1F51F"),
        ("flag-for-chad", "1F3C1"),
        ("flag-for-flag-chad", "1F3C1"),
    ],
)
def test_code_of_understands_numbered_drawings_after_exact_names(
    texts: sources.EmojiTexts, icon: str, code: str | None
) -> None:
    assert texts.code_of(icon) == code
