"""Find a checkpoint folder: a local directory, the Hugging Face cache, or the hub itself."""

import os
import re
from pathlib import Path

from jaxquant.checkpoint.folder import CONFIG_NAME, find_weights
from jaxquant.errors import CheckpointError, JaxquantError

_ALLOW_PATTERNS = [
    "*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "LICENSE*", "NOTICE*",
]  # fmt: skip
# Patterns match across slashes: other formats' weights lie in subfolders, Mistral's own sharding
# (consolidated*) beside the one that config.json describes.
_IGNORE_PATTERNS = ["*/*", "consolidated*"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def resolve(path_or_hub_id: str | os.PathLike, revision: str | None = None) -> Path:
    """Return the local folder of a checkpoint, downloading it if need be.

    Args:
        path_or_hub_id: an existing directory, or a hub id 'org/name'. A complete copy in the
            Hugging Face cache is used without asking the hub for a newer one.
        revision: branch, tag or commit on the hub; its main branch if None.

    Raises `CheckpointError` if there is no such folder, or the hub does not give it.
    """
    name = os.fspath(path_or_hub_id)
    path = Path(name).expanduser() if name.startswith("~") else Path(name)
    if name and os.path.isdir(path):
        if revision is not None:
            raise JaxquantError(
                f"{path}: revision {revision!r} given for a local folder; it selects among the "
                f"revisions of a hub id: leave it out"
            )
        return path
    if name and os.path.exists(path):
        raise CheckpointError(f"{path}: a file; give the folder that holds it and {CONFIG_NAME}")
    if not isinstance(path_or_hub_id, str) or _looks_like_path(name):
        raise CheckpointError(f"{path}: no such folder")
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"{name!r}: neither an existing folder nor a hub id of the form 'org/name'"
        )
    return _resolve_hub_id(name, revision)


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith((".", "~"))
        or os.path.isabs(name)
        or "\\" in name
        or name.endswith((".safetensors", ".gguf", ".json", ".bin"))
    )


def _resolve_hub_id(hub_id: str, revision: str | None) -> Path:
    # Imported here: it is slow to import, and local folders do without.
    import huggingface_hub

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id,
                revision=revision,
                allow_patterns=_ALLOW_PATTERNS,
                ignore_patterns=_IGNORE_PATTERNS,
                local_files_only=local_files_only,
            )
        )

    try:
        cached = snapshot(local_files_only=True)
        if _missing(cached) is None:
            return cached
    except OSError:  # not in the cache, or not all of it
        pass
    except ValueError as error:  # the hub's own rules for ids
        raise CheckpointError(f"{hub_id!r}: not a hub id: {_first_line(error)}") from error

    try:
        folder = snapshot(local_files_only=False)
    except Exception as error:  # the HTTP library's own errors come through too
        # Newer versions of huggingface_hub refuse a cached copy that lacks any file, be it a
        # license; ours to say whether it will do.
        partial = getattr(error, "snapshot_path", None)
        if partial is None or _missing(Path(partial)) is not None:
            raise CheckpointError(_explain(hub_id, revision, error)) from error
        folder = Path(partial)
    # Without a network, older versions return what is cached, complete or not.
    if (missing := _missing(folder)) is not None:
        raise CheckpointError(f"{hub_id}: incomplete on the hub or in the cache: {missing}")
    return folder


def _missing(folder: Path) -> str | None:
    """Say what keeps the folder from being a complete checkpoint, None if nothing does."""
    try:
        files = [folder / CONFIG_NAME, *find_weights(folder)]
    except CheckpointError as error:
        return str(error)
    return next((f"{file}: no such file" for file in files if not os.path.isfile(file)), None)


def _explain(hub_id: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case GatedRepoError():
            return (
                f"{hub_id}: gated on the hub: accept its terms at https://huggingface.co/{hub_id}, "
                f"then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return (
                f"{hub_id}: no such folder here and no such repository on the hub; check the "
                f"name, and if it is private log in with `hf auth login`"
            )
        case RevisionNotFoundError():
            return f"{hub_id}: no revision {revision!r} on the hub; check the branch, tag or commit"
        case LocalEntryNotFoundError() | OfflineModeIsEnabled():
            return (
                f"{hub_id}: not complete in the local cache and the hub cannot be reached; connect "
                f"to the network (and unset HF_HUB_OFFLINE), or give a local folder"
            )
        case _:
            return f"{hub_id}: download failed: {type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
