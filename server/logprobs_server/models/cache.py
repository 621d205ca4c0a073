"""Folders that are made once and then stay: whole or not there at all, whoever else makes them at the same time.

A folder is made beside its place under a hidden name, written to disk, and renamed. A lock, which the system
releases when its holder dies, lets one process work while others wait; whoever holds it removes what an interrupted
one left behind. Knows nothing of what the folders hold.
"""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from logprobs_server.models.errors import ModelNotUsableError
from logprobs_server.models.progress import Progress

__all__ = ["make_once"]


def make_once(folder: Path, make: Callable[[Path], None], progress: Progress) -> Path:
    """The folder, made if it is not there.

    Args:
        make: fills the empty folder given to it, whose parent is free for temporary files; what is put there goes.
    Raises:
        ModelNotUsableError: the place cannot be written to.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock"), progress):
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelNotUsableError(f"{folder.parent}: the converted model cannot be written here: {reason}") from error
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    prefix = f".{folder.name}.tmp-"
    for stale in folder.parent.glob(f"{glob.escape(prefix)}*"):  # the lock is ours: nobody works in there
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        for path in (*made.iterdir(), made):
            _sync(path)
        made.rename(folder)
    _sync(folder.parent)


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress("waiting for another process that prepares the same model", None):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(path: Path) -> None:
    """Waits until the file's bytes, or the folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
