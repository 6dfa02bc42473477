"""
Command lines in forked processes: imports are paid for once, by a process that has no threads and forks for each command.

Started as a program, it reads commands from stdin, one JSON object a line, and prints the process id of each and, when it
has ended, its status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


class ForkServer:
    """Runs `hf_unlearn.cli.main` in forked processes, and kills them."""

    def __enter__(self) -> ForkServer:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def start(self, argv: list[str], log: Path, kill_at: tuple[str, str, int] | None = None) -> int:
        """
        Start a command; its process id.

        Args:
            argv (list of `str`): Arguments of `main`.
            log (`Path`): Where its output goes.
            kill_at (`tuple`, *optional*): Module (or `module:class`), name of a function and a number: the process kills
                itself in that call of the function, after half of the file at its path is written, if there is one.
        """
        self.process.stdin.write(json.dumps({"argv": argv, "log": str(log), "kill_at": kill_at}) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        """The exit code of the command, or the negative number of the signal that ended it; until then it has its id."""
        self.process.stdin.write("wait\n")
        self.process.stdin.flush()
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline()))

    def run(self, argv: list[str], log: Path, kill_at: tuple[str, str, int] | None = None) -> tuple[int, str]:
        """Run a command to its end: its exit code and output."""
        self.start(argv, log, kill_at)
        return self.wait(), log.read_text()

    def kill(self, argv: list[str], log: Path, after: float) -> int:
        """Kill a command `after` seconds; its exit code, 0 or above where it had ended before."""
        pid = self.start(argv, log)
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
        return self.wait()


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    for command in ("train", "sweep", "extrapolate"):
        importlib.import_module(f"hf_unlearn.cli.{command}")
    for line in iter(sys.stdin.readline, ""):
        command = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(**command)
        print(pid, flush=True)
        sys.stdin.readline()
        print(os.waitpid(pid, 0)[1], flush=True)


def run(argv: list[str], log: str, kill_at: tuple[str, str, int] | None) -> None:
    from hf_unlearn.cli import main

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (0, 1, 2):
        os.dup2(output, stream)
    if kill_at is not None:
        kill_in_call(*kill_at)
    code = main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def kill_in_call(owner: str, name: str, number: int) -> None:
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
    serve()
