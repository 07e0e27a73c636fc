"""Files written whole or not at all, hashed, and locked."""

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from textlora.core.errors import StorageError


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it replaces `path` in one step, else it is removed.

    The data reach the disk before the name does, so that a power cut leaves the old file or the new one.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", "free some space or choose another folder"
        ) from error
    part = Path(name)
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, path)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", "free some space or choose another folder"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises StorageError as `atomic_path` does."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_parts(folder: Path) -> None:
    """Remove the temporary files that a killed process left in `folder`. Only for who holds the folder's
    lock."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold `folder/.lock` while the block runs; the kernel drops it when the process dies.

    Raises:
        StorageError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise StorageError(
            f"{folder} is in use by another run", "wait for it to end or choose another --output"
        ) from error
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror or error}", "choose another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
