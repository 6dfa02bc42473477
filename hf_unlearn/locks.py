"""One run at a time in one output folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from hf_unlearn.errors import UnlearningError


@contextmanager
def working_in(folder: str | Path) -> Iterator[None]:
    """
    Keep other runs out of an output folder within this context.

    The lock is the file `.<name>.lock` beside the folder, or `.lock` in it where nothing can be written beside it. A
    process that is killed leaves the file, and keeps nobody out.

    Args:
        folder (`str` or `Path`): The folder; it need not exist.
    """
    folder = Path(folder).expanduser().resolve()
    parents = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        path = folder.with_name(f".{folder.name}.lock")
        if not os.access(folder.parent, os.W_OK):
            path = folder / ".lock"
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UnlearningError(f"Another run is working in {folder}. Wait, or name another --output_dir.") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise UnlearningError(f"Nothing can be written to {folder}: {reason}. Name another --output_dir.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()
        lock.release()
        for parent in parents:  # of an output that has not come about
            with suppress(OSError):
                parent.rmdir()
