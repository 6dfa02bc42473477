"""
Temporary siblings of an output folder, and what becomes of those whose process was killed.

`.out.tmp-<host>-<process>-<random>` is being filled, `.out.old-<host>-<process>-<random>` is the earlier `out`, set
aside for the moment between two renames. Whether their process is alive can be told on its own host only: siblings of
other hosts stay, with a warning. Containers that share a host name must not write to one output at the same time.
"""

from __future__ import annotations

import glob
import logging
import os
import platform
import re
import shutil
import uuid
from pathlib import Path

import psutil


logger = logging.getLogger(__name__)


def temporary_sibling(final: Path, kind: str) -> Path:
    """A new name beside `final` that says which process it belongs to; `kind` is `"tmp"` or `"old"`."""
    return final.with_name(f".{final.name}.{kind}-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def clear_leftovers(final: Path) -> None:
    """
    Remove what processes of this host that are no longer alive have left beside `final`. A folder that was set aside
    goes back to its place when nothing has taken it.
    """
    pattern = re.compile(rf"\.{re.escape(final.name)}\.(tmp|old)-(.*)-(\d+)-[0-9a-f]{{8}}")
    for path in sorted(final.parent.glob(f".{glob.escape(final.name)}.*")):
        match = pattern.fullmatch(path.name)
        if match is None:
            continue
        kind, host, process = match.groups()
        if host != platform.node():
            logger.warning(f"{path} was left by a run on {host!r}. Delete it if that run has ended.")
        elif psutil.pid_exists(int(process)):
            continue
        elif kind == "old" and not final.exists():
            path.rename(final)
            logger.warning(
                f"An earlier run was killed while it replaced {final}: the old folder is back in its place."
            )
        else:
            shutil.rmtree(path, ignore_errors=True)
