"""Packages of pictures and texts: fetched once by their own clients, read in memory, never unpacked to disk."""

import io
import json
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_MEMBER_BYTES = 128 * 2**20


class Unavailable(Exception):
    """A package, or the client that fetches it, cannot be had."""


def run_client(command: list[str], directory: Path) -> None:
    """Runs a package client in `directory`. Raises Unavailable with the first errors that it told."""
    if shutil.which(command[0]) is None:
        raise Unavailable(f"the client {command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=900)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(command)}` took longer than {error.timeout:.0f} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in said if "error" in line or line.startswith("E:")] or said[-1:]
        raise Unavailable(f"`{' '.join(command)}` failed: {'; '.join(errors[:2])}")


def fetch(command: list[str], cache: Path, pattern: str) -> Path:
    """The one file in `cache` that matches `pattern`, fetched by `command` if it is not there."""
    if cached := sorted(cache.glob(pattern)):
        return cached[-1]
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as directory:
        run_client(command, Path(directory))
        found = sorted(Path(directory).glob(pattern))
        if not found:
            raise Unavailable(f"`{' '.join(command)}` left no file {pattern}")
        return found[-1].replace(cache / found[-1].name)


def fetch_npm(package: str, cache: Path) -> Path:
    """The tarball of an npm package, given as name@version."""
    name, version = package.rsplit("@", 1)
    command = ["npm", "pack", package, "--loglevel=error", "--ignore-scripts"]
    return fetch(command, cache, f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz")


def fetch_deb(package: str, cache: Path) -> Path:
    """The Debian package that the system's sources offer; `apt-get update` may be needed first."""
    return fetch(["apt-get", "download", package], cache, f"{package}_*.deb")


def tar_members(file: io.BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file of bearable size, read in memory: nothing is unpacked to disk."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isreg() and member.size <= MAX_MEMBER_BYTES:
                yield member.name.removeprefix("./"), archive.extractfile(member).read()


def npm_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        yield from tar_members(file)


def deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files a Debian package installs. Raises ValueError if it is not such a package."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"expected a Debian package (an ar archive), got {path.name}")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                yield from tar_members(io.BytesIO(file.read(size)))
                return
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"expected a data.tar member in {path.name}, got none")


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a damaged package raises while it is read into Unavailable."""
    try:
        yield
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, KeyError) as error:
        raise Unavailable(f"{what} cannot be read ({error!r}); delete it from the cache to fetch it anew") from error


def npm_json(path: Path, *members: str) -> list:
    """The parsed JSON of the named members of a package; an empty dict for one that is not there."""
    content = {name: data for name, data in npm_members(path) if name in {f"package/{member}" for member in members}}
    return [json.loads(content.get(f"package/{member}", b"{}")) for member in members]
