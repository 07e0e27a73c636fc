"""The hub, both ways: an adapter fetched by its id, and a finished folder pushed.

Only files with the names of `folder.FOLDER_FILES` travel: never `run/`, checkpoints or pickles. Token,
endpoint, cache and offline mode are huggingface_hub's own (HF_TOKEN or `hf auth login`, HF_ENDPOINT, HF_HOME,
HF_HUB_OFFLINE).
"""

import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from textlora.adapters.card import pushed_card
from textlora.adapters.folder import (
    CARD_FILE,
    CONFIG_FILE,
    FOLDER_FILES,
    SIDE_FILE,
    AdapterMeta,
    lora_config,
    read_adapter,
    write_side_file,
)
from textlora.core.errors import AdapterError, StorageError, TextloraError, UsageError
from textlora.core.files import write_text

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_LOCAL_PATH = re.compile(
    r"(?<![\w.:/~)}-])(/\w[\w.-]*)(?:/[\w.@+-]+)+|(?<!\w)[A-Za-z]:\\+\w[^\\\s\"]*\\[^\s\"]+"
)
_LOGIN = "set HF_TOKEN or run `hf auth login`"


def adapter_folder(path: str | Path, revision: str | None = None) -> Path:
    """The folder an adapter lies in: `path` itself, or for a hub id (owner/name) the copy in the hub's cache,
    fetched where needed.

    Raises:
        AdapterError: no such folder and no such adapter on the hub, no access, or the hub cannot be reached.
        UsageError: a revision of something that is not on the hub.
    """
    if not Path(path).exists() and _HUB_ID.fullmatch(str(path)):
        return _download(str(path), revision)
    if revision is not None:
        raise UsageError(
            f"--revision {revision}: {path} is a folder",
            "leave it out; only adapters on the hub have revisions",
        )
    return Path(path)


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*FOLDER_FILES, SIDE_FILE]))
    except HFValidationError as error:
        raise AdapterError(f"{hub_id}: no such adapter folder, and not a hub id", "check the path") from error
    except RevisionNotFoundError as error:
        raise AdapterError(
            f"{hub_id}: no revision '{revision}' on the hub",
            "name a branch, tag or commit of it with --revision",
        ) from error
    except GatedRepoError as error:
        raise AdapterError(
            f"{hub_id}: its owner grants access one by one (gated)",
            f"ask for it on its page on the hub, then {_LOGIN}",
        ) from error
    except RepositoryNotFoundError as error:
        what = f"{hub_id}: no folder here and no such adapter on the hub (or it is private)"
        raise AdapterError(what, f"check the name; for a private one {_LOGIN}") from error
    except LocalEntryNotFoundError as error:
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise AdapterError(
                f"{hub_id}: no folder here, and the hub answered with an error ({_first_line(cause)})",
                "try again later",
            ) from error
        why = (
            "HF_HUB_OFFLINE is set"
            if isinstance(cause, OfflineModeIsEnabled)
            else "the hub cannot be reached"
        )
        raise AdapterError(
            f"{hub_id}: no folder here, {why} and the adapter is not in the hub's cache",
            "give the path of a local folder",
        ) from error
    except HfHubHTTPError as error:
        raise AdapterError(
            f"{hub_id}: the hub answered with an error ({_first_line(error)})", "try again later"
        ) from error
    # a broken download: the hub's client, its transfer library and the disk raise kinds of their own
    except Exception as error:
        raise AdapterError(
            f"{hub_id}: the download failed ({_first_line(error)})", "try again; what was fetched is kept"
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise AdapterError(
            f"{hub_id}: holds no adapter_model.safetensors",
            "it is no adapter, or one saved as a pickle, which can run code and is not fetched",
        )
    return folder


def push_adapter(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> dict[str, Any]:
    """Check a finished adapter folder and upload it in one commit, its card made fit for the hub. The folder
    itself stays as it is.

    Args:
        repo_id: owner/name; made where it is not there yet.
        private: only its owner sees the new repository. An existing public one is refused.
        revision: branch to commit to, made where it is not there yet; default: main.
        message: of the commit.

    Returns:
        repo, url, commit, files, bytes, and notes: what the hub said about the card.

    Raises:
        AdapterError: the folder is damaged or not finished, or a file would give away a token or a path of
            this machine.
        UsageError: not a repository id, no token, or no right to write there.
        StorageError: the hub cannot be reached or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    adapter = read_adapter(folder)
    if adapter.meta is None:
        raise AdapterError(
            f"{folder}: no {SIDE_FILE}, so labels and task would be missing on the hub",
            "only finished textlora folders are pushed",
        )
    lora = lora_config(adapter)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: not the id of a hub repository", "give owner/name") from error
    if "/" not in repo_id:
        raise UsageError(f"{repo_id}: names no owner", "give owner/name")
    token = get_token()
    if token is None:
        raise UsageError("there is no hub token, so nothing can be pushed", _LOGIN)
    with tempfile.TemporaryDirectory(prefix="textlora-push-") as name:
        staging = Path(name)
        for part in FOLDER_FILES:
            if part in adapter.meta.files and part != CARD_FILE:
                shutil.copyfile(adapter.path / part, staging / part)
        write_text(staging / CARD_FILE, pushed_card(adapter.path / CARD_FILE, adapter.meta, lora, repo_id))
        write_side_file(staging, adapter.meta)
        files = sorted(staging.iterdir())
        _refuse_secrets(files, adapter.meta, token)
        operations = [CommitOperationAdd(path.name, str(path)) for path in files]
        with warnings.catch_warnings(record=True) as caught:  # the hub's remarks on the card come as warnings
            warnings.simplefilter("always")
            try:
                done = _commit(
                    HfApi(token=token),
                    repo_id,
                    operations,
                    private,
                    revision,
                    message or f"Upload {adapter.path.resolve().name}",
                )
            except TextloraError:
                raise
            except Exception as error:
                raise _push_error(repo_id, error) from error
        size = sum(path.stat().st_size for path in files)
    notes = [
        " ".join(str(warning.message).split()) for warning in caught if CARD_FILE in str(warning.message)
    ]
    return {
        "repo": repo_id,
        "url": done.repo_url,
        "commit": done.oid,
        "files": [path.name for path in files],
        "bytes": size,
        "notes": notes,
    }


def _commit(
    api: Any, repo_id: str, operations: list[Any], private: bool, revision: str | None, message: str
) -> Any:
    api.create_repo(repo_id, private=True if private else None, exist_ok=True)
    if private and not api.model_info(repo_id).private:
        raise UsageError(
            f"{repo_id} is already there and public",
            "make it private on its page first, or leave out --private",
        )
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


def _push_error(repo_id: str, error: Exception) -> TextloraError:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403, 404):
        return UsageError(
            f"{repo_id}: the hub does not let you write there ({_first_line(error)})",
            f"check the name and the token's rights; {_LOGIN}",
        )
    if status is not None:
        return StorageError(f"{repo_id}: the hub answered with an error ({_first_line(error)})", "try again")
    return StorageError(f"{repo_id}: the upload failed ({_first_line(error)})", "try again")


def _refuse_secrets(files: list[Path], meta: AdapterMeta, token: str) -> None:
    """No token in what everybody may read, and no path of this machine in what textlora or its user wrote."""
    for path in files:
        if path.suffix not in (".json", ".md", ".txt"):
            continue
        text = path.read_text(encoding="utf-8")
        mend = "take it out" if path.name == CARD_FILE else "make the folder again without it"
        if token in text or _TOKEN.search(text):
            raise AdapterError(f"{path.name} holds a hub token", f"{mend}, and revoke the token")
        if path.name in (SIDE_FILE, CARD_FILE, CONFIG_FILE):
            for label in meta.labels:  # one may look like a path
                text = text.replace(label, "") if "/" in label[:-1] else text
            for found in _LOCAL_PATH.finditer(text):
                if found.group(1) is None or Path(found.group(1)).is_dir():
                    raise AdapterError(f"{path.name} names a path of this machine: {found.group()}", mend)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
