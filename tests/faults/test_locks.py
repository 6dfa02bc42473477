"""Two runs in one output folder at the same time: the second is refused, and a killed one keeps nobody out."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from command_lines import set_arguments, train_arguments

from hf_unlearn.cli import main
from hf_unlearn.errors import UnlearningError
from hf_unlearn.locks import working_in


def hold(folder: Path, ready) -> None:
    with working_in(folder):
        ready.send(True)
        signal.pause()


@pytest.fixture
def other_run(tmp_path):
    """Another process that works in `out`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=hold, args=(tmp_path / "out", there))
    process.start()
    assert here.recv()
    yield process
    process.kill()
    process.join()


@pytest.fixture(scope="module")
def ledger(files, adapter, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("requests") / "ledger")
    request = ["--adapter", adapter, "--alpha", "1", "--id", "one", *set_arguments(files, "forget")]
    assert main(["requests", "add", "--ledger", folder, *request]) == 0
    return folder


COMMANDS = ["train", "rounds", "launch", "extrapolate", "forget-adapter", "combine", "sweep", "eval", "audit"]
COMMANDS += ["export", "build", "quickstart"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_run_is_refused(command, other_run, files, adapter, ledger, tmp_path, capsys):
    out = tmp_path / "out"
    output, alpha = ["--output_dir", str(out)], ["--adapter", adapter, "--alpha", "2"]
    sets = set_arguments(files, "forget", "retain")
    arguments = {
        "train": train_arguments(files, out),
        "rounds": train_arguments(files, out, "--rounds", "2"),
        "launch": train_arguments(files, out, "--accelerate_config", "single_gpu"),
        "extrapolate": ["extrapolate", *alpha, *output],
        "forget-adapter": ["extrapolate", *alpha, "--format", "adapter", *output],
        "combine": ["combine", "--operator", "momentum", "--adapters", adapter, *output],
        "sweep": ["sweep", "--adapter", adapter, *sets, *output],
        "eval": ["eval", "--model", files["model"], *sets, *output],
        "audit": ["audit", "--model", files["model"], *sets, *output],
        "export": ["export", "--format", "vllm", "--adapter", adapter, *output],
        "build": ["requests", "build", "--ledger", ledger, *output],
        "quickstart": ["quickstart", "--model", files["model"], *output],
    }
    assert main(arguments[command]) == 2
    message = f"Another run is working in {out}. Wait, or name another --output_dir."
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_a_dry_run_needs_no_lock(other_run, files, adapter, tmp_path):
    assert main(train_arguments(files, tmp_path / "out", "--dry_run")) == 0
    assert (
        main(["extrapolate", "--adapter", adapter, "--alpha", "2", "--output_dir", str(tmp_path / "out"), "--dry_run"])
        == 0
    )


def test_a_killed_run_keeps_nobody_out(other_run, adapter, tmp_path):
    os.kill(other_run.pid, signal.SIGKILL)
    other_run.join()
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]
    command = ["extrapolate", "--adapter", adapter, "--alpha", "2", "--format", "adapter"]
    assert main([*command, "--output_dir", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_is_left(tmp_path):
    with working_in(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b" / ".out.lock").exists()
        with pytest.raises(UnlearningError, match="Another run is working"), working_in(tmp_path / "a" / "b" / "out"):
            pass
        assert (tmp_path / "a" / "b" / ".out.lock").exists()
    assert not any(tmp_path.iterdir())
    with working_in(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out").mkdir()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
