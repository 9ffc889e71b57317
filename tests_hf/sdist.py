"""The source distribution of the installed transformers: fetched once with pip, of which only the tests are kept."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"
ESSENTIAL = "tests/test_modeling_common.py"


class FetchError(RuntimeError):
    """The source distribution could not be had, or is not the one that was asked for."""


def unpack(archive: Path, release: str, folder: Path) -> None:
    """Unpack the tests of transformers `release` from `archive` into `folder`, which must not exist yet.

    Only the files `tests/*.py`, the licence and the metadata are written: the mixins run against the transformers that
    is installed, never against a second copy of its sources.

    Raises:
        FetchError: not a readable archive, the wrong release, or an archive without the tests.
    """
    root = f"transformers-{release}"
    wanted = re.compile(re.escape(root) + r"/(tests/[^/]+\.py|LICENSE|PKG-INFO)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        try:
            with tarfile.open(archive) as tar:
                members = [member for member in tar if member.isfile() and wanted.fullmatch(member.name)]
                tar.extractall(scratch, members, filter="data")
        except (tarfile.TarError, OSError, EOFError) as error:
            raise FetchError(f"expected the source distribution {root}, got {archive}, unreadable: {error}") from error
        fresh = Path(scratch) / root
        metadata = (fresh / "PKG-INFO").read_text("utf-8") if (fresh / "PKG-INFO").is_file() else ""
        if not re.search(rf"^Version: {re.escape(release)}$", metadata, re.MULTILINE):
            raise FetchError(f"expected transformers {release}, got another release or no metadata in {archive}")
        if not (fresh / ESSENTIAL).is_file():
            raise FetchError(f"expected {ESSENTIAL} in the source distribution, got {archive} without it")
        shutil.move(fresh, folder)


def fetch(cache: Path = CACHE, release: str | None = None) -> Path:
    """The folder with `tests/*.py` of transformers `release` (the installed one), from the cache or else from pip.

    Raises:
        FetchError: pip could not download it, or what came is not that release.
    """
    release = release or version("transformers")
    folder = cache / f"transformers-{release}"
    if (folder / ESSENTIAL).is_file():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")  # what is fetched is no part of this project
    with tempfile.TemporaryDirectory(dir=cache) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", "transformers", "--dest", downloads, f"transformers=={release}"]
        result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INPUT": "1"})
        archives = sorted(Path(downloads).glob("transformers-*.tar.gz"))
        if result.returncode or len(archives) != 1:
            raise FetchError(
                f"pip could not download the source distribution of transformers {release} "
                f"(it needs the network once; later runs use {cache}):\n{result.stderr.strip()}"
            )
        unpack(archives[0], release, folder)
    return folder


__all__ = ["CACHE", "FetchError", "fetch", "unpack"]
