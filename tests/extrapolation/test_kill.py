"""`hf-unlearn extrapolate` killed at any moment: the output is whole or absent, and a new run succeeds."""

from __future__ import annotations

import signal
from pathlib import Path

import kill_in_call
import pytest
from extrapolation_models import build_llama, save_pair
from interpreters import Interpreters, Process
from safetensors.torch import load_file

from hf_unlearn.cli import main


MOMENTS = {  # in which it kills itself
    "fsync": ("os", "fsync", 2),
    "first-rename": ("pathlib:Path", "rename", 1),
    "second-rename": ("pathlib:Path", "rename", 2),
    "removal": ("shutil", "rmtree", 1),
}
# The command line, slow at each tensor, to be killed from outside.
SLOW = """
import sys, time
from hf_unlearn.cli import main
from hf_unlearn.extrapolation import checkpoint

as_bytes = checkpoint._as_bytes
checkpoint._as_bytes = lambda tensor: time.sleep(0.2) or as_bytes(tensor)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    base, adapter, _ = save_pair(build_llama(), tmp_path_factory.mktemp("kill"), shard="90KB")
    return base, adapter


def start(interpreters: Interpreters, pair, output: Path, moment: str) -> Process:
    killing = (kill_in_call.__file__, *MOMENTS[moment]) if moment in MOMENTS else ("-c", SLOW)
    return interpreters.start(*killing, *arguments(pair, output))


def arguments(pair, output: Path) -> list[str]:
    base, adapter = map(str, pair)
    options = ["--base", base, "--adapter", adapter, "--alpha", "2", "--overwrite"]
    return ["extrapolate", *options, "--output_dir", str(output)]


def run_again(pair, output: Path) -> None:
    """A later run, which is not killed."""
    assert main(arguments(pair, output)) == 0
    assert list(output.parent.iterdir()) == [output]
    for path in pair[0].glob("*.safetensors"):
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
