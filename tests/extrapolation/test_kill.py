"""`hf-unlearn extrapolate` killed at any moment: the output is whole or absent, and a new run succeeds."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from extrapolation_models import build_llama, save_pair
from interpreters import Interpreters, Process
from safetensors.torch import load_file

from hf_unlearn.cli import main


# The command line, killed before its `count`-th call of `name`; or slow at each tensor, to be killed from outside.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from hf_unlearn.cli import main
from hf_unlearn.extrapolation import checkpoint

owner, name, count = {"fsync": (os, "fsync", 2), "first-rename": (Path, "rename", 1),
                      "second-rename": (Path, "rename", 2), "removal": (checkpoint.shutil, "rmtree", 1),
                      "write": (checkpoint, "_as_bytes", 0)}[sys.argv[1]]
original, calls = getattr(owner, name), []

def call(*args, **options):
    calls.append(name)
    if not count:
        time.sleep(0.2)
    elif len(calls) == count:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **options)

setattr(owner, name, call)
sys.exit(main(["extrapolate", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, adapter, _ = save_pair(build_llama(), tmp_path_factory.mktemp("kill"), shard="90KB")
    return base, adapter


def start(interpreters: Interpreters, pair, output: Path, moment: str) -> Process:
    base, adapter = pair
    arguments = ["--base", base, "--adapter", adapter, "--output_dir", output, "--alpha", "2", "--overwrite"]
    return interpreters.start("-c", SCRIPT, moment, *arguments)


def run_again(pair, output: Path) -> None:
    """A later run, which is not killed."""
    base, adapter = pair
    arguments = ["--base", base, "--adapter", adapter, "--output_dir", output, "--alpha", "2", "--overwrite"]
    assert main(["extrapolate", *map(str, arguments)]) == 0
    assert list(output.parent.iterdir()) == [output]
    for path in base.glob("*.safetensors"):
        assert load_file(output / path.name).keys() == load_file(path).keys()


def kill_at_some_byte(process: Process, folder: Path) -> None:
    """Kill the process from outside once a part of the weights is written."""
    process.wait_until(
        lambda: [path for path in folder.glob(".out.tmp-*/*.safetensors") if path.stat().st_size > 30_000]
    )
    process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("moment", ["write", "fsync", "first-rename"])
def test_without_an_earlier_output_there_is_none(interpreters, pair, tmp_path, moment):
    process = start(interpreters, pair, tmp_path / "out", moment)
    if moment == "write":
        kill_at_some_byte(process, tmp_path)
    assert process.wait() == -signal.SIGKILL, process.output
    (left,) = (path for path in tmp_path.iterdir() if path.name != ".out.lock")
    assert left.name.startswith(".out.tmp-") and str(process.pid) in left.name
    run_again(pair, tmp_path / "out")


@pytest.mark.parametrize("moment", ["first-rename", "second-rename", "removal"])
def test_an_earlier_output_stays_whole_or_is_replaced(interpreters, pair, tmp_path, caplog, moment):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("old")
    process = start(interpreters, pair, tmp_path / "out", moment)
    assert process.wait() == -signal.SIGKILL, process.output
    if moment == "second-rename":
        assert not (tmp_path / "out").exists()
        (aside,) = tmp_path.glob(".out.old-*")
        assert (aside / "mine").read_text() == "old"
    elif moment == "removal":
        assert (tmp_path / "out" / "unlearning.json").exists() and not (tmp_path / "out" / "mine").exists()
    else:
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    run_again(pair, tmp_path / "out")
    assert ("the old folder is back in its place" in caplog.text) == (moment == "second-rename")
