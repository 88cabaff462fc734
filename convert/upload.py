"""Upload a converted checkpoint to the hub in one commit, with a model card."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_smolvlm.checkpoint.headers import INDEX_FILE, read_headers
from mlx_smolvlm.checkpoint.load import (
    CARD_FILE,
    CONFIG_FILE,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    read_config,
)
from mlx_smolvlm.checkpoint.provenance import ORIGIN_FILE, SUMS_FILE, format_sums, read_sums
from mlx_smolvlm.convert.card import format_model_card
from mlx_smolvlm.convert.source import is_hub_id
from mlx_smolvlm.errors import CheckpointError, SmolVLMWarning
from mlx_smolvlm.files import compute_sha256
from mlx_smolvlm.media.fetch import is_offline

if TYPE_CHECKING:
    from huggingface_hub import HfApi

EXTRAS = ("verify.png",)  # the plot of a comparison with the source
_PRIVATE = "verify.json"  # quotes the texts of the comparison, so it is not published


def check_upload(repo: str) -> str:
    """Check that an upload to `repo` can be tried, and return the name of the logged-in user.

    Nothing is created on the hub.

    Raises:
        CheckpointError: `repo` is not a valid repository name, nobody is logged in, or the hub
            cannot be reached.
    """
    if not is_hub_id(repo):
        raise CheckpointError(f"'{repo}' is not a repository name; give owner/name")
    if is_offline():
        raise CheckpointError(f"{repo}: an upload needs the network, and HF_HUB_OFFLINE is set")
    from huggingface_hub import HfApi

    try:
        return str(HfApi().whoami()["name"])
    except Exception as error:  # its HTTP library differs between versions, and so do the errors
        raise CheckpointError(
            f"{repo}: {_explain_error(error, 'asking who is logged in')}"
        ) from None


def upload(
    folder: Path, repo: str, *, private: bool = False, force: bool = False, section: str = ""
) -> str:
    """Upload the checkpoint in `folder` to the hub and return the URL of the commit.

    The repository is created if needed. Weights of an earlier version are removed in the same
    commit.

    Args:
        folder: A checkpoint folder of this format.
        repo: The hub id, owner/name.
        private: Make a new repository private; an existing one is not changed.
        force: Replace a checkpoint of another format.
        section: See `format_model_card`.

    Raises:
        CheckpointError: `folder` is not a complete checkpoint, a weight file does not match its
            checksum, the repository holds a checkpoint of another format, or the hub refuses.
    """
    read_config(folder)
    files = _list_files(folder)
    card = format_model_card(folder, repo, section)
    sums = _compute_sums(folder, files)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        remote_names = set(api.list_repo_files(repo))
    except Exception as error:  # see check_upload
        raise CheckpointError(f"{repo}: {_explain_error(error, 'making the repository')}") from None
    if CONFIG_FILE in remote_names and SUMS_FILE not in remote_names and not force:
        raise CheckpointError(
            f"{repo} holds a checkpoint of another format; choose another name, or use "
            "force=True to replace it"
        )
    local_paths = {path.name: path for path in files}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, str(path)) for name, path in local_paths.items()
    ]
    operations.append(CommitOperationAdd(CARD_FILE, card.encode()))
    operations.append(CommitOperationAdd(SUMS_FILE, format_sums(sums).encode()))
    stale = _find_stale(remote_names, set(local_paths))
    operations += [CommitOperationDelete(name) for name in sorted(stale)]
    return _commit(api, repo, operations)


def _list_files(folder: Path) -> list[Path]:
    """List the files of the checkpoint in `folder` to upload unchanged."""
    weights = {info.file for info in read_headers(folder).values()}
    names = [CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE, ORIGIN_FILE, *EXTRAS]
    if len(weights) > 1:
        names.append(INDEX_FILE)
    for name in (TOKENIZER_FILE, TEMPLATE_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing; convert the checkpoint again")
    return sorted(weights | {folder / name for name in names if (folder / name).is_file()})


def _compute_sums(folder: Path, files: list[Path]) -> dict[str, str]:
    """Compute the checksums of `files`, by name.

    Warns if a text file was edited since its checksum was written. Weights are never edited: with
    another checksum they are damaged.

    Raises:
        CheckpointError: A file cannot be read, or a weight file does not match its checksum.
    """
    stated = read_sums(folder) or {}
    try:
        sums = {path.name: compute_sha256(path) for path in files}
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}") from None
    for name, value in sums.items():
        if stated.get(name, value) == value:
            continue
        if name.endswith(".safetensors"):
            raise CheckpointError(
                f"{folder / name} differs from its sum in {SUMS_FILE}, so it may be damaged; "
                "convert the checkpoint again"
            )
        warnings.warn(
            f"{name} was changed since its checksum was written; it is published with a new one",
            SmolVLMWarning,
            stacklevel=3,
        )
    return sums


def _find_stale(remote_names: set[str], local_names: set[str]) -> set[str]:
    """Find files in the repository that the new checkpoint would leave outdated."""
    names = {INDEX_FILE, ORIGIN_FILE, _PRIVATE, *EXTRAS}
    old = {name for name in remote_names if name in names or name.endswith(".safetensors")}
    return {name for name in old - local_names if "/" not in name}


def _commit(api: HfApi, repo: str, operations: list) -> str:  # type: ignore[type-arg]
    """Make a commit of `operations` and return its URL."""
    try:
        commit = api.create_commit(
            repo, operations, commit_message="Upload a checkpoint of mlx-smolvlm"
        )
    except Exception as error:  # see check_upload
        raise CheckpointError(f"{repo}: {_explain_error(error, 'uploading')}") from None
    return str(commit.commit_url)


def _explain_error(error: Exception, doing: str) -> str:
    """Return a message: what went wrong with the hub while `doing`, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalTokenNotFoundError):
        return "nobody is logged in to the hub: `hf auth login` with a token that may write"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "an upload needs the network, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.HFValidationError):
        return "this is not a valid repository id; give owner/name"
    status = getattr(getattr(error, "response", None), "status_code", None)
    reasons = {
        401: "the hub does not accept the token: `hf auth login` with one that may write",
        403: "the token may not write there: check the owner's name, and that the token may write",
        404: "the hub has no such owner or repository, or the token may not see it",
        429: "the hub asks to wait: too many requests; try again later",
    }
    if status in reasons:
        return f"{reasons[status]} ({doing}: {status})"
    detail = (str(error).strip().splitlines() or [repr(error)])[0]
    if status is None:
        return f"the hub cannot be reached ({doing}: {detail}); the local folder is unchanged"
    return f"the hub refuses ({doing}: {status}, {detail})"
