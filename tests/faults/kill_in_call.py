"""A command line that kills itself in the call of a function: `kill_in_call.py OWNER NAME NUMBER ARGUMENTS...`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hf_unlearn.cli import main


def kill_in_call(owner: str, name: str, number: int) -> None:
    """
    Let this process kill itself, after half of the file at the function's path is written, if it has one.

    Args:
        owner (`str`): Module, or `module:class`.
        name (`str`): Name of its function.
        number (`int`): In which of its calls.
    """
    module, _, kind = owner.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, kind) if kind else holder
    original: Callable = getattr(holder, name)
    calls = []

    def call(*args, **options):
        calls.append(name)
        if len(calls) < number:
            return original(*args, **options)
        paths = [Path(arg) for arg in args if isinstance(arg, str)]
        if paths:  # of a function that writes a file
            original(*args, **options)
            paths[0].write_bytes(paths[0].read_bytes()[: paths[0].stat().st_size // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(holder, name, call)


if __name__ == "__main__":
    kill_in_call(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    sys.exit(main(sys.argv[4:]))
