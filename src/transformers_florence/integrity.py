# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""SHA-256 manifests: every save leaves one beside its files, and `verify_checkpoint` finds what changed since."""

import hashlib
import os
import re
from contextvars import ContextVar
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from uuid import uuid4

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from transformers.utils import PushToHubMixin

MANIFEST = "checkpoint.sha256"  # lines as coreutils writes them: `sha256sum --check checkpoint.sha256` reads it
# Names of what decides what a checkpoint computes; other files (a model card, a trainer's state) are not looked at.
COVERED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",  # `load_checkpoint` never reads it; `from_pretrained` does where it finds nothing better
    "pytorch_model*.bin.index.json",
    "adapter_model.bin",
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "*processor_config.json",
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.jinja",
    "*.py",
)
LINE = re.compile(r"^([0-9a-f]{64})  ([^/\\\r\n]+)\n", re.MULTILINE)

_saving: ContextVar[bool] = ContextVar("saving", default=False)


def is_covered(name: str) -> bool:
    """Whether a file of this name belongs into the manifest."""
    return any(fnmatchcase(name, pattern) for pattern in COVERED)


def sha256(file: Path) -> str:
    """The digest of a file, 64 hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def folder_digests(folder: Path) -> dict[str, str]:
    """Name -> digest of each covered file of a folder; folders in it are not looked into."""
    files = sorted(file for file in folder.iterdir() if is_covered(file.name) and file.is_file())
    return {file.name: sha256(file) for file in files}


def repository_digests(repo_id: str, revision: str | None, token: Any, pushed: dict[str, str]) -> dict[str, str]:
    """Name -> digest of each covered file that a repository of the Hub holds once `pushed` is in it.

    The Hub tells the digests of large files; small ones, git's, are fetched.
    """
    api = HfApi(token=token)
    try:
        entries = list(api.list_repo_tree(repo_id, revision=revision))
    except RevisionNotFoundError:  # the push will make this branch, from the default one
        entries, revision = list(api.list_repo_tree(repo_id)), None
    digests = dict(pushed)
    for entry in entries:
        if isinstance(entry, RepoFile) and is_covered(entry.path) and entry.path not in pushed:
            if entry.lfs is not None:
                digests[entry.path] = entry.lfs.sha256
            else:
                digests[entry.path] = sha256(Path(api.hf_hub_download(repo_id, entry.path, revision=revision)))
    return digests


def manifest_text(digests: dict[str, str]) -> str:
    """The one way to write these digests down."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def store_manifest(folder: Path, digests: dict[str, str]) -> None:
    """Write the manifest in one step: whoever reads meanwhile gets the old one or the new one, whole."""
    temporary = folder / f".{MANIFEST}.{uuid4().hex}"
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(manifest_text(digests))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def read_manifest(file: Path) -> dict[str, str]:
    """Name -> digest, as the manifest has them.

    Raises:
        ValueError: it is missing, empty, or anything but what `store_manifest` writes.
    """
    try:
        content = file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"expected a manifest, got {file}, missing or corrupt: {error!r}") from error
    digests = {name: digest for digest, name in LINE.findall(content)}
    if not digests or manifest_text(digests) != content:
        raise ValueError(f"expected a manifest, got {file}, which is corrupt")
    return digests


def write_manifest(folder: str | os.PathLike) -> None:
    """Vouch for a checkpoint's folder as it is now: for files that were changed or added by hand.

    Saving does this by itself; `verify_checkpoint` tells what differs from the last time.

    Raises:
        ValueError: no such folder, or nothing in it that belongs to a checkpoint.
    """
    path = Path(folder)
    digests = folder_digests(path) if path.is_dir() else {}
    if not digests:
        raise ValueError(f"expected the folder of a checkpoint, got {str(folder)!r}: nothing of a checkpoint there")
    store_manifest(path, digests)


def verify_checkpoint(folder: str | os.PathLike) -> dict[str, str]:
    """Compare every file that makes up a checkpoint with the SHA-256 of when it was saved.

    Looked at are weights, configurations, tokenizer, processors and code in the folder itself. Other files may lie
    beside them. This finds damage, not malice: who can change a file can change the manifest. For a model on the
    Hub, pass what `huggingface_hub.snapshot_download` returns.

    Args:
        folder: where a model or a processor of this package was saved.

    Returns:
        Name -> SHA-256 of the files, all of which are as they were saved.

    Raises:
        ValueError: the manifest is missing or corrupt, or files were changed, are missing, or were added since; the
            message lists all of them.

    Example:
        >>> FlorenceModel(FlorenceConfig.from_size("nano")).save_pretrained("nano")
        >>> sorted(verify_checkpoint("nano"))
        ['config.json', 'model.safetensors']
    """
    path = Path(folder)
    expected, found = read_manifest(path / MANIFEST), folder_digests(path)
    complaints = {
        "changed": [name for name in expected if found.get(name, expected[name]) != expected[name]],
        "missing": [name for name in expected if name not in found],
        f"not in {MANIFEST}": [name for name in found if name not in expected],
    }
    listed = [f"{kind}: {', '.join(names)}" for kind, names in complaints.items() if names]
    if listed:
        raise ValueError(
            f"expected the files that {path / MANIFEST} lists, got {'; '.join(listed)} "
            "(if that is meant, `write_manifest` vouches for them)"
        )
    return expected


class ManifestMixin(PushToHubMixin):
    """For what is saved into a checkpoint's folder: each save, and each push to the Hub, leaves the manifest current.

    The manifest vouches for the whole folder (or repository) as the save leaves it: model and processor may be saved
    or pushed in either order, over older files, in shards.
    """

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; then the manifest is written."""
        inside = _saving.set(True)
        try:
            saved = super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            _saving.reset(inside)
        # Of several processes one writes; of a processor that saves its tokenizer, the processor does.
        writes = getattr(self, "should_save_on_this_rank", bool)(kwargs.get("is_main_process", True))
        if writes and not _saving.get() and os.path.isdir(save_directory):
            digests = folder_digests(Path(save_directory))
            if digests:  # none where a tokenizer was saved alone, with a prefix before its files' names
                store_manifest(Path(save_directory), digests)
        return saved

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], **kwargs: Any
    ) -> Any:
        """What transformers pushes with: the same files, and a manifest of what the repository will then hold."""
        folder = Path(working_dir)
        own = folder_digests(folder)
        pushed = {
            name: digest
            for name, digest in own.items()
            if name not in files_timestamps or (folder / name).stat().st_mtime > files_timestamps[name]
        }
        store_manifest(folder, repository_digests(repo_id, kwargs.get("revision"), kwargs.get("token"), pushed))
        try:
            return super()._upload_modified_files(working_dir, repo_id, files_timestamps, **kwargs)
        finally:
            store_manifest(folder, own)


__all__ = [
    "MANIFEST",
    "ManifestMixin",
    "is_covered",
    "read_manifest",
    "repository_digests",
    "sha256",
    "verify_checkpoint",
    "write_manifest",
]
