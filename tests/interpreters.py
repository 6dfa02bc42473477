"""
Python in other processes, without waiting for its imports: one process has imported everything, has no threads, and forks
for each call.

Started as a program it is that process: it reads requests from stdin, one JSON object a line, and answers each.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[1]
# Commands, with all they need.
IMPORTED = ("train", "sweep", "extrapolate", "eval", "audit", "push", "quickstart", "requests")


@dataclass
class Process:
    """
    A call that runs.

    Args:
        pid (`int`): Its process id, which it has until it is waited for.
        log (`Path`): What it has printed so far.
        interpreters ([`Interpreters`]): Its parent.
        code (`int`, *optional*): Its exit code, once it was waited for.
    """

    pid: int
    log: Path
    interpreters: Interpreters
    code: int | None = None

    @property
    def output(self) -> str:
        """What it has printed so far, to stdout and stderr."""
        return self.log.read_text(encoding="utf-8")

    def wait(self, timeout: float = 300) -> int:
        """Wait for its end, kill it after `timeout` seconds; its exit code, or the negative number of its signal."""
        if self.code is None:
            timer = threading.Timer(timeout, self.send_signal, [signal.SIGKILL])
            timer.start()
            try:
                self.code = os.waitstatus_to_exitcode(self.interpreters.ask(wait=self.pid))
            finally:
                timer.cancel()
        return self.code

    def wait_until(self, condition: Callable[[], object], timeout: float = 120) -> None:
        """Wait until something is true of what it does."""
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, self.output[-3000:]
            time.sleep(0.001)

    def wait_for(self, text: str) -> None:
        """Wait until it has printed `text`."""
        self.wait_until(lambda: text in self.output)

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


class Interpreters:
    """
    Runs what `python` would run.

    Args:
        folder (`Path`): Where the output of the calls is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = 0

    def __enter__(self) -> Interpreters:
        path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
        variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "PYTHONPATH": path}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | variables,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.stdin.close()
        self.server.wait()

    def ask(self, **request: object) -> int:
        """Send a request, and return the answer."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, *arguments: object, environment: dict[str, str] | None = None) -> Process:
        """
        Start a call.

        Args:
            arguments: As of `python`: `-c` and code, `-m` and a module, or a file; then those of the program.
            environment (`dict[str, str]`, *optional*): Variables besides those of this process. Those that are read when a
                module is imported come too late.
        """
        self.calls += 1
        log = self.folder / f"{self.calls}.log"
        log.touch()
        variables = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        variables |= {"CUDA_VISIBLE_DEVICES": "", **(environment or {})}
        pid = self.ask(start=[str(part) for part in arguments], log=str(log), environment=variables, cwd=os.getcwd())
        return Process(pid, log, self)

    def run(self, *arguments: object, environment: dict[str, str] | None = None) -> tuple[int, str]:
        """Run a call to its end: its exit code, and what it printed."""
        process = self.start(*arguments, environment=environment)
        return process.wait(), process.output

    def launch(
        self, *arguments: object, environment: dict[str, str] | None = None, config: Path | None = None
    ) -> list[str]:
        """
        Run a call in two processes that know of each other, as torchrun does; what each printed. Both must succeed.

        Args:
            arguments: As of [`start`].
            environment (`dict[str, str]`, *optional*): As of [`start`].
            config (`Path`, *optional*): Configuration of `accelerate launch`, whose variables the processes get.
        """
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        shared |= variables_of(config) if config is not None else {}
        shared |= environment or {}
        processes = [
            self.start(*arguments, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        codes = [process.wait() for process in processes]
        assert codes == [0, 0], "\n\n".join(process.output[-3000:] for process in processes)
        return [process.output for process in processes]


def variables_of(config: Path) -> dict[str, str]:
    """What `accelerate launch` puts into the environment of the processes that it starts."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    parsed = launch.launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    arguments, defaults, _ = launch._validate_launch_command(parsed)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, variables = prepare_deepspeed_cmd_env(arguments)
    else:
        variables = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in variables.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def serve() -> Sequence[str]:
    """Answer requests until there are no more. Returns in a child: with the arguments of its call."""
    import torch

    from hf_unlearn.cli import _no_collections

    torch.set_num_threads(1)
    with _no_collections():
        for command in IMPORTED:
            importlib.import_module(f"hf_unlearn.cli.{command}")
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "wait" in request:
            print(os.waitpid(request["wait"], 0)[1], flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            become(request["log"], request["environment"], request["cwd"])
            return request["start"]
        print(pid, flush=True)
    return ()


def become(log: str, environment: dict[str, str], cwd: str) -> None:
    """Take over the output, the environment and the folder of a call."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)


def interpret(arguments: Sequence[str]) -> None:
    """What `python` does with its arguments."""
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    arguments = serve()
    if not arguments:
        return
    code = 1
    try:
        interpret(arguments)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # without taking apart, object by object, all that was imported


if __name__ == "__main__":
    main()
