"""Packages: the client is run once and its words are passed on; archives are read in memory and within bounds."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest

import picture_packages as packages
from tests.tiny_packages import tar_of, write_deb, write_npm


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a client is a shell script; run it on Linux or macOS")
def test_client_is_run_once_and_its_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")
    cache = tmp_path / "cache"
    cache.mkdir()

    client.write_text(
        "#!/bin/sh\necho npm notice >&2\necho npm error 404 no such package >&2\necho more >&2\nexit 1\n"
    )
    client.chmod(0o755)
    with pytest.raises(packages.Unavailable, match="npm pack @a/b@1.2 .*failed: npm error 404 no such package$"):
        packages.fetch_npm("@a/b@1.2", cache)
    assert list(cache.iterdir()) == []  # nothing half fetched

    client.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nprintf content > a-b-1.2.tgz\n')
    for _ in range(2):
        assert packages.fetch_npm("@a/b@1.2", cache).read_bytes() == b"content"
    assert (tmp_path / "calls").read_text() == "pack @a/b@1.2 --loglevel=error --ignore-scripts\n"
    assert [path.name for path in cache.iterdir()] == ["a-b-1.2.tgz"]


def test_archives_are_read_in_memory_and_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 10)
    buffer = io.BytesIO(tar_of({"../../outside": "small", "large": "x" * 11}, "w:gz"))
    with tarfile.open(fileobj=(linked := io.BytesIO()), mode="w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    linked.seek(0)
    assert list(packages.tar_members(buffer)) == [("../../outside", b"small")]
    assert list(packages.tar_members(linked)) == []
    assert list(tmp_path.iterdir()) == []


def test_both_kinds_of_package_are_read(tmp_path: Path) -> None:
    write_npm(tmp_path, "@a/b@1.2", {"data.json": {"key": [1]}, "raw.bin": b"\x00\xff"})
    write_deb(tmp_path, "drawings", {"usr/share/one.svg": "<svg/>"})
    npm, deb = packages.fetch_npm("@a/b@1.2", tmp_path), packages.fetch_deb("drawings", tmp_path)
    files = {"package/data.json": b'{"key": [1]}', "package/raw.bin": b"\x00\xff"}
    assert dict(packages.npm_members(npm)) == files
    assert packages.npm_json(npm, "missing.json", "data.json") == [{}, {"key": [1]}]
    assert list(packages.deb_members(deb)) == [("usr/share/one.svg", b"<svg/>")]


@pytest.mark.parametrize("end", [0, 40, -2000])
@pytest.mark.parametrize(
    ("write", "pattern", "members"),
    [(write_npm, "*.tgz", packages.npm_members), (write_deb, "*.deb", packages.deb_members)],
)
def test_a_damaged_package_is_unavailable(tmp_path: Path, write, pattern: str, members, end: int) -> None:
    write(tmp_path, "drawings@1", {"raw.bin": random.randbytes(4000)})
    (path,) = tmp_path.glob(pattern)
    path.write_bytes(path.read_bytes()[:end])
    complaint = "the drawings cannot be read .*; delete it from the cache"
    with pytest.raises(packages.Unavailable, match=complaint), packages.readable("the drawings"):
        list(members(path))
